#!/usr/bin/env bash
# Everything that wants a GPU, in under 10 minutes and with no network: facts, build, tests, compute-sanitizer,
# benchmarks. Every stage runs, whatever became of the others; the last lines say what became of each, and the exit
# status is 1 if any failed. Logs and results: $OUT, by default benchmarks/results/gpu-out.
#
# python3 needs torch with CUDA, numpy, pytest (ml_dtypes and pytest-xdist if there are), pybind11, cmake, ninja. The
# build replaces fusedopt/_C*.so by one for this machine's GPU.
#
# In the stages the status 77 means: skipped, and the log's last line says why.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
LIMIT=585 # seconds for all of it

if ! nvidia-smi -L >/dev/null 2>&1 && [ ! -e /dev/nvidia0 ]; then
  echo "no GPU here: nothing was run" >&2
  exit 1
fi

export OUT="${OUT:-benchmarks/results/gpu-out}"
mkdir -p "$OUT" || exit 1
OUT="$(cd "$OUT" && pwd)"
rm -f "$OUT"/{facts,build,tests,tests-gpu,sanitizer,gpu,summary}.txt "$OUT/gpu.json"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Only the plugins that the tests were written with.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
command -v nvcc >/dev/null || export PATH="$PATH:/usr/local/cuda/bin"

facts() {
  date -u +"date: %FT%TZ"
  echo "commit: ${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
  git status --short 2>/dev/null | head -n 40
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  nvidia-smi --query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit --format=csv
  nvcc --version | tail -n 2
  cmake --version | head -n 1
  uname -rm
  nproc
  python3 - <<'PYTHON'
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
assert torch.cuda.is_available(), "torch sees no GPU"
print(torch.cuda.get_device_properties(0))
PYTHON
}

build() {
  # What an earlier build left must not be taken for this one's.
  rm -f "fusedopt/_C$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
  # This machine's architecture alone: 90 for 9.0.
  FUSEDOPT_CUDA_ARCHS="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)"
  export FUSEDOPT_CUDA=on FUSEDOPT_CUDA_ARCHS
  if ! python3 setup.py build_ext --inplace; then
    # An old setuptools may not read pyproject.toml; CMakeLists.txt needs none.
    echo "setup.py failed: trying cmake by itself"
    local folder=build/gpu
    cmake -G Ninja -S . -B "$folder" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/fusedopt" \
      -DFUSEDOPT_VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
      -DPython_EXECUTABLE="$(python3 -c 'import sys; print(sys.executable)')" \
      -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" \
      -DFUSEDOPT_CUDA="$FUSEDOPT_CUDA" -DFUSEDOPT_CUDA_ARCHS="$FUSEDOPT_CUDA_ARCHS" &&
      cmake --build "$folder" || return 1
  fi
  python3 -c "
import fusedopt
print(fusedopt.show_config())
why = fusedopt._config._C.why_no_cuda()
assert why is None, why"
}

# pytest, with a failure if not one test passed.
some_pass() {
  local log status
  log="$(mktemp)"
  "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 0 ] && ! grep -qE '(^|[ ,])[0-9]+ passed' "$log"; then
    echo "not one test passed"
    status=1
  fi
  rm -f "$log"
  return "$status"
}

tests() {
  local workers=() which=(tests --ignore=tests/test_cuda_gpu.py) # that one is the next stage's
  if python3 -c 'import xdist' 2>/dev/null; then workers=(-p xdist.plugin -n 8 --dist loadgroup); fi
  if ! python3 -c 'import ml_dtypes' 2>/dev/null; then
    echo "ml_dtypes is missing: only tests/test_cuda*.py"
    which=()
    local file
    for file in tests/test_cuda*.py; do [ "$file" = tests/test_cuda_gpu.py ] || which+=("$file"); done
    if [ ! -e "${which[0]:-}" ]; then
      echo "ml_dtypes is missing, and there is no other tests/test_cuda*.py"
      return 77
    fi
  fi
  some_pass python3 -m pytest -q ${workers[@]+"${workers[@]}"} "${which[@]}"
}

tests_gpu() {
  local workers=()
  if python3 -c 'import xdist' 2>/dev/null; then workers=(-p xdist.plugin -n 4); fi
  some_pass python3 -m pytest -q ${workers[@]+"${workers[@]}"} tests/test_cuda_gpu.py
}

sanitizer() { # TOOL
  local tool folder log status
  tool="$(command -v compute-sanitizer)"
  for folder in /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer /opt/nvidia/compute-sanitizer; do
    [ -n "$tool" ] || { [ -x "$folder/compute-sanitizer" ] && tool="$folder/compute-sanitizer"; }
  done
  if [ -z "$tool" ]; then
    echo "compute-sanitizer was not found"
    return 77
  fi
  echo "== compute-sanitizer --tool $1"
  log="$(mktemp)"
  # Without torch's pooling of memory, so that what lies between two tensors belongs to nobody.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 some_pass "$tool" --tool "$1" --report-api-errors no --error-exitcode 99 \
    python3 -m pytest -q tests/test_cuda_gpu.py -k sanitizer 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  if grep -q 'Device not supported' "$log"; then
    echo "compute-sanitizer does not support this machine's device"
    status=77
  elif [ "$status" = 0 ] && ! grep -qE 'ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards' "$log"; then
    echo "compute-sanitizer gave no summary without errors"
    status=1
  fi
  rm -f "$log"
  return "$status"
}

export -f facts build some_pass tests tests_gpu sanitizer

failed=0
summary=()
# stage NAME SECONDS LOG COMMAND...: to the log, and the log's end to the screen if it failed.
stage() {
  local name=$1 limit=$2 log="$OUT/$3" begin=$SECONDS status word detail
  shift 3
  echo "== $name (at most $limit s)"
  if [ "$name" = benchmarks ]; then
    timeout -k 3 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
  else
    timeout -k 3 "$limit" bash -c '"$@"' "$name" "$@" >>"$log" 2>&1
    status=$?
  fi
  detail="$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | cut -c 1-120)"
  case $status in
    0) word=ok ;;
    77) word=skipped ;;
    124 | 137) word=FAILED detail="ended after $limit s" failed=1 ;;
    *) word=FAILED detail="status $status; $detail" failed=1 ;;
  esac
  if [ "$word" = FAILED ] && [ "$name" != benchmarks ]; then tail -n 30 "$log" | cut -c 1-300; fi
  summary+=("$(printf '%-12s %-8s %4d s  %s' "$name" "$word" $((SECONDS - begin)) "$detail")")
}

stage facts 25 facts.txt facts
stage build 110 build.txt build
stage tests 130 tests.txt tests
stage tests-gpu 90 tests-gpu.txt tests_gpu
stage memcheck 45 sanitizer.txt sanitizer memcheck
stage racecheck 45 sanitizer.txt sanitizer racecheck
stage offload 25 offload.txt python3 -m benchmarks.offload --quick --json "$OUT/offload.json"
# The last one has what is left, at least 110 s.
left=$((LIMIT - SECONDS))
stage benchmarks "$left" gpu.txt python3 -m benchmarks.gpu --json "$OUT/gpu.json" --seconds "$((left - 15))"

printf '%s\n' "" "${summary[@]}" | tee "$OUT/summary.txt"
exit "$failed"
