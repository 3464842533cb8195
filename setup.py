"""Hands the native core over to CMakeLists.txt, the only description of the build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target,
            "FUSEDOPT_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            # Named anew each time: what an earlier isolated build cached is gone.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # Users' switches, by the same names, from the environment; each time, or the last build's would stay.
        switches = {"FUSEDOPT_CUDA": "auto", "FUSEDOPT_CUDA_ARCHS": "", "FUSEDOPT_SANITIZE": ""}
        definitions |= {name: os.environ.get(name, default) for name, default in switches.items()}
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", SOURCE, "-B", build, *flags], check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
