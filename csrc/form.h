// How the streams of a parameter are stored, where that differs from one another or from the nearest value. Plain data.
#pragma once

#include <cstdint>

#include "lanes/lane.h"
#include "table.h"

namespace fusedopt {

// What is kept beside a parameter of 16 bits, for the value that it stands for.
enum class Companion : uint8_t {
  kNone,
  kMaster,        // that value in float32
  kRemainder,     // what bfloat16 lacks of it, a signed integer of 16 bits; as a tensor, its two bytes
  kCompensation,  // what rounding took (Kahan), in the parameter's dtype
};

// Where kernels find a stream, whatever the form has before it: as kParam, kGrad and kState + k.
constexpr int kCompanionSlot = kState + kMaxStates, kEmaSlot = kCompanionSlot + 1, kNumSlots = kEmaSlot + 1;

constexpr int64_t kCodeBlock = 128;  // elements of a row of dimension 0 that share a scale

struct Form {
  DType param = DType::kFloat32, grad = DType::kFloat32, state = DType::kFloat32, ema = DType::kFloat32;
  Companion companion = Companion::kNone;
  bool stochastic_param = false, stochastic_state = false;
  int8_t num_states = 0;
  uint32_t position = 0;  // of the parameter, in the draws
  uint64_t seed = 0;
  // Of a part of a larger tensor, where its elements lie there, in row-major order: runs of so many, the first at
  // `first`, their beginnings `stride` apart. 0: all in one run.
  int64_t first = 0, run = 0, stride = 0;
  int64_t row_numel = 1;  // elements of a row of dimension 0: where the state is codes, no block crosses one

  FUSEDOPT_HD bool is_coded() const { return state == DType::kCode; }
  // Is anything rounded by draws? Then elements are walked in row-major order, because their place in it counts.
  FUSEDOPT_HD bool draws() const { return stochastic_param || stochastic_state || is_coded(); }

  // Streams behind the states: the codes' scales, the companion, the average.
  FUSEDOPT_HD int scales() const { return kState + num_states; }
  FUSEDOPT_HD int companion_stream() const { return scales() + is_coded(); }
  FUSEDOPT_HD int ema_stream() const { return companion_stream() + (companion != Companion::kNone); }
  // Of a slot; -1 if the form has none.
  FUSEDOPT_HD int stream(int slot) const {
    if (slot < kState) return slot;
    if (slot < kCompanionSlot) return slot < scales() ? slot : -1;
    if (slot == kEmaSlot) return ema_stream();
    return companion != Companion::kNone ? companion_stream() : -1;
  }
  FUSEDOPT_HD DType dtype(int stream) const {
    if (stream == kParam) return param;
    if (stream == kGrad) return grad;
    if (stream < scales()) return state;
    if (is_coded() && stream == scales()) return DType::kFloat32;
    if (companion != Companion::kNone && stream == companion_stream())
      return companion == Companion::kMaster ? DType::kFloat32 : param;
    return ema;
  }

  // The place of an element in the whole tensor, by which it is drawn for.
  FUSEDOPT_HD int64_t whole(int64_t element) const {
    return run == 0 ? first + element : first + element / run * stride + element % run;
  }
  // Do four elements that begin at a multiple of four lie so in the whole tensor?
  FUSEDOPT_HD bool keeps_fours() const { return (first | run | stride) % 4 == 0; }

  FUSEDOPT_HD int64_t blocks_per_row() const { return (row_numel + kCodeBlock - 1) / kCodeBlock; }
  // The first element, from this one on, that a block begins with.
  FUSEDOPT_HD int64_t next_block(int64_t element) const {
    const int64_t in_row = element % row_numel;
    const int64_t next = (in_row + kCodeBlock - 1) / kCodeBlock * kCodeBlock;
    return element - in_row + (next < row_numel ? next : row_numel);
  }
  FUSEDOPT_HD int64_t block_end(int64_t element) const {
    const int64_t in_row = element % row_numel;
    const int64_t end = in_row - in_row % kCodeBlock + kCodeBlock;
    return element - in_row + (end < row_numel ? end : row_numel);
  }
  // Blocks counted through all rows.
  struct Block {
    int64_t begin, end;
  };
  FUSEDOPT_HD Block block(int64_t index) const {
    const int64_t per_row = blocks_per_row();
    // Where they suffice, 32 bits: a GPU divides 64 by a long routine.
    const int64_t row =
        (index | per_row) >> 31 == 0 ? static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row) : index / per_row;
    const int64_t in_row = (index - row * per_row) * kCodeBlock, left = row_numel - in_row;
    const int64_t begin = row * row_numel + in_row;
    return {begin, begin + (left < kCodeBlock ? left : kCodeBlock)};
  }
  FUSEDOPT_HD int64_t block_of(int64_t element) const {
    return element / row_numel * blocks_per_row() + element % row_numel / kCodeBlock;
  }

  bool operator==(const Form& o) const {
    return param == o.param && grad == o.grad && state == o.state && ema == o.ema && companion == o.companion &&
           stochastic_param == o.stochastic_param && stochastic_state == o.stochastic_state &&
           num_states == o.num_states && position == o.position && seed == o.seed && first == o.first && run == o.run &&
           stride == o.stride && row_numel == o.row_numel;
  }
};

}  // namespace fusedopt
