#include "driver.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fusedopt {
namespace cuda {

static const Runtime* in_use = nullptr;
const Runtime* runtime() { return in_use; }
void set_runtime(const Runtime* runtime) { in_use = runtime; }

static int64_t num_launches = 0;
int64_t launches() { return num_launches; }

void plan_chunks(const int64_t* numel, int64_t num_rows, int64_t* first_chunk, std::vector<int32_t>* row_of_chunk) {
  int64_t chunk = 0;
  for (int64_t n = 0; n < num_rows; ++n) {
    first_chunk[n] = chunk;
    chunk += (numel[n] + kChunk - 1) / kChunk;
  }
  row_of_chunk->resize(chunk);
  for (int64_t n = 0; n < num_rows; ++n) {
    const int64_t end = n + 1 < num_rows ? first_chunk[n + 1] : chunk;
    std::fill(row_of_chunk->begin() + first_chunk[n], row_of_chunk->begin() + end, static_cast<int32_t>(n));
  }
}

Table::~Table() {
  // What a graph may read stays.
  try {
    if (memory_) cuda_->release(info_.device, memory_);
    for (std::byte* memory : retired_) cuda_->release(info_.device, memory);
    for (const Staging& staging : staging_) cuda_->release_pinned(staging.at, staging.event);
  } catch (const std::runtime_error&) {
    // The process is ending and CUDA is gone.
  }
}

void Table::add(const TensorRow& row, const RowInfo& info) {
  const size_t n = num_rows_++;
  if (n == 0) {
    scalars_.clear();
    scalars_index_.clear();
    on_device_ = false;
  }
  if (n == rows_.size()) {
    rows_.push_back({});
    grads_.push_back(nullptr);
    layouts_.push_back(nullptr);
    rows_changed_ = true;
  }
  int32_t scalars = info.group;
  if (info.step) {
    on_device_ = true;
  } else if (!scalars_.empty() && scalars_.back() == info.scalars) {
    scalars = static_cast<int32_t>(scalars_.size()) - 1;
  } else {
    const auto [found, is_new] = scalars_index_.emplace(info.scalars, static_cast<int32_t>(scalars_.size()));
    if (is_new) scalars_.push_back(info.scalars);
    scalars = found->second;
  }
  Row& at = rows_[n];
  const Ema ema = row.beside ? row.beside->ema : Ema::kNone;
  bool same = at.step == info.step && at.numel == row.numel && at.scalars == scalars && at.variant == info.variant &&
              at.step_is_double == info.step_is_double && layouts_[n] == row.layout && at.ema == ema &&
              at.entry == info.entry && at.elsewhere == info.elsewhere;
  for (int k = 0; k < kMaxStreams; ++k) same &= k == kGrad || at.data[k] == row.data[k];
  const Form form = row.form ? *row.form : Form{};
  same &= at.form == form;
  if (!same) {
    std::memcpy(at.data, row.data, sizeof at.data);
    at.data[kGrad] = nullptr;
    at.step = info.step;
    at.numel = row.numel;
    at.scalars = scalars;
    at.variant = info.variant;
    at.step_is_double = info.step_is_double;
    at.ema = ema;
    at.entry = info.entry;
    at.elsewhere = info.elsewhere;
    at.form = form;
    layouts_[n] = row.layout;
    rows_changed_ = true;
  }
  if (grads_[n] != row.data[kGrad]) {
    grads_[n] = row.data[kGrad];
    grads_changed_ = true;
  }
}

// Lays the whole image out anew.
void Table::build(const StepInfo& info) {
  std::vector<Layout::Dim> dims;
  std::vector<SparseGrad> sparse;
  std::vector<int64_t> numel(num_rows_), first_chunk(num_rows_);
  for (size_t n = 0; n < num_rows_; ++n) {
    Row& row = rows_[n];
    numel[n] = row.numel;
    row.layout = row.sparse = -1;
    row.ndim = 0;
    if (!layouts_[n]) continue;
    if (const SparseGrad* grad = layouts_[n]->sparse) {
      row.sparse = static_cast<int64_t>(sparse.size());
      sparse.push_back(*grad);
      dims.insert(dims.end(), grad->dims, grad->dims + grad->num_dims);
    }
    row.layout = static_cast<int64_t>(dims.size());
    row.ndim = layouts_[n]->ndim;
    dims.insert(dims.end(), layouts_[n]->dim, layouts_[n]->dim + row.ndim);
  }
  std::vector<int32_t> row_of_chunk;
  plan_chunks(numel.data(), num_rows_, first_chunk.data(), &row_of_chunk);
  for (size_t n = 0; n < num_rows_; ++n) rows_[n].first_chunk = first_chunk[n];
  num_chunks_ = row_of_chunk.size();

  size_t size = 0;
  const auto place = [&](size_t bytes) {
    const size_t at = size;
    size = (size + bytes + 15) / 16 * 16;
    return at;
  };
  place(2 * sizeof(unsigned));  // blocks_done
  place(num_rows_ * sizeof grads_[0]);
  scalars_at_ = place(num_more_ * info.scalars_size);
  options_at_ = place(options_size_);
  hot_size_ = size;
  rows_at_ = place(num_rows_ * sizeof(Row));
  dims_at_ = place(dims.size() * sizeof(Layout::Dim));
  sparse_at_ = place(sparse.size() * sizeof(SparseGrad));
  chunks_at_ = place(row_of_chunk.size() * sizeof(int32_t));
  image_.assign(size, std::byte{0});
  norm_at_ = place(num_chunks_ * sizeof(NormPart));
  stats_at_ = place(num_chunks_ * sizeof(StatsPart));
  size_ = size;
  const auto put = [&](size_t at, const auto& values) {
    if (!values.empty()) std::memcpy(image_.data() + at, values.data(), values.size() * sizeof values[0]);
  };
  put(rows_at_, rows_);
  put(dims_at_, dims);
  put(sparse_at_, sparse);
  put(chunks_at_, row_of_chunk);
}

constexpr size_t kGradsAt = 16;  // behind blocks_done

void Table::upload(const StepInfo& info, std::byte* to, const std::byte* from, size_t bytes) {
  Staging* staging = nullptr;
  for (Staging& candidate : staging_) {
    if (candidate.capacity < bytes || (candidate.event && !cuda_->is_done(candidate.event))) continue;
    staging = &candidate;
    break;
  }
  if (!staging) {
    const size_t capacity = bytes * 3 / 2;
    staging_.push_back({static_cast<std::byte*>(cuda_->allocate_pinned(capacity)), capacity, nullptr});
    staging = &staging_.back();
  }
  std::memcpy(staging->at, from, bytes);
  cuda_->copy(info.device, to, staging->at, bytes, info.stream, &staging->event);
}

void Table::prepare(const StepInfo& info, bool changed) {
  info_ = info;
  full_ = on_device_ || info.full || info.dtype == DType::kMixed;
  cuda_->make_ready(info.rule, info.dtype, full_, info.device);
  if (rows_.size() != num_rows_) {
    rows_.resize(num_rows_);
    grads_.resize(num_rows_);
    layouts_.resize(num_rows_);
    rows_changed_ = true;
  }
  const size_t num_more = scalars_.size() > kInlineScalars ? scalars_.size() : 0;
  const size_t options_size = full_ ? info.options_size : 0;
  const bool all = rows_changed_ || changed || info.capturing || num_more != num_more_ || options_size != options_size_;
  if (all) {
    rows_changed_ = true;  // until the image is where it belongs
    num_more_ = num_more;
    options_size_ = options_size;
    build(info);
  }
  bool hot = grads_changed_ || num_more > 0;
  grads_changed_ = true;
  std::memcpy(image_.data() + kGradsAt, grads_.data(), num_rows_ * sizeof grads_[0]);
  for (size_t i = 0; i < num_more; ++i)
    std::memcpy(image_.data() + scalars_at_ + i * info.scalars_size, scalars_[i], info.scalars_size);
  if (options_size && std::memcmp(image_.data() + options_at_, info.options, options_size) != 0) {
    std::memcpy(image_.data() + options_at_, info.options, options_size);
    hot = true;
  }

  std::byte* at;
  if (info.capturing) {
    // The graph gets a table of its own, which nothing else writes and nothing frees.
    at = static_cast<std::byte*>(cuda_->allocate(info.device, size_));
    cuda_->copy_now(info.device, at, image_.data(), image_.size());
    captured_.push_back({at, options_at_, options_size});
  } else {
    bool moved = false;
    if (capacity_ < size_) {
      const size_t capacity = size_ * 3 / 2;
      std::byte* memory = static_cast<std::byte*>(cuda_->allocate(info.device, capacity));
      if (memory_) retired_.push_back(memory_);
      memory_ = memory;
      capacity_ = capacity;
      moved = true;
    }
    at = memory_;
    const size_t size = all || moved ? image_.size() : hot ? hot_size_ : kGradsAt;
    if (size > kGradsAt) upload(info, at + kGradsAt, image_.data() + kGradsAt, size - kGradsAt);
    rows_changed_ = grads_changed_ = false;
  }

  Where where{};
  where.rows = reinterpret_cast<const Row*>(at + rows_at_);
  where.grads = reinterpret_cast<std::byte* const*>(at + kGradsAt);
  where.dims = reinterpret_cast<const Layout::Dim*>(at + dims_at_);
  where.sparse = reinterpret_cast<const SparseGrad*>(at + sparse_at_);
  where.row_of_chunk = reinterpret_cast<const int32_t*>(at + chunks_at_);
  where.num_rows = num_rows_;
  where.num_chunks = num_chunks_;
  where.options = full_ ? reinterpret_cast<const Options*>(at + options_at_) : nullptr;
  where.groups = full_ ? at + options_at_ + sizeof(Options) : nullptr;
  where.answer = info.answer;
  where.norm_parts = info.norm ? reinterpret_cast<NormPart*>(at + norm_at_) : nullptr;
  where.stats = info.stats;
  where.stats_parts = reinterpret_cast<StatsPart*>(at + stats_at_);
  where.more_scalars = num_more ? at + scalars_at_ : nullptr;
  where.found_inf = info.found_inf;
  where.grad_scale = info.grad_scale;
  where.blocks_done = reinterpret_cast<unsigned*>(at);
  args_.resize(sizeof where + kInlineScalars * info.scalars_size);
  std::memcpy(args_.data(), &where, sizeof where);
  for (size_t i = 0; i < scalars_.size() && !num_more; ++i)
    std::memcpy(args_.data() + sizeof where + i * info.scalars_size, scalars_[i], info.scalars_size);
}

void Table::launch_norm(bool is_first, bool is_last) {
  NormArgs args{};
  std::memcpy(&args.at, args_.data(), sizeof args.at);
  args.how = info_.how;
  args.is_first = is_first;
  args.is_last = is_last;
  args.report_inf = info_.report_inf;
  ++num_launches;
  cuda_->launch_norm(info_.dtype, args, info_.device, info_.stream);
}

void Table::launch_decision() {
  NormArgs args{};
  std::memcpy(&args.at, args_.data(), sizeof args.at);
  args.at.num_chunks = 0;
  args.is_last = true;
  args.report_inf = info_.report_inf;
  ++num_launches;
  cuda_->launch_norm(info_.dtype, args, info_.device, info_.stream);
}

void Table::launch(bool counts_skips, bool counts_averages) {
  if (num_chunks_ == 0 && !full_) return;  // nothing but empty tensors
  Where where;
  std::memcpy(&where, args_.data(), sizeof where);
  where.counts_skips = counts_skips;
  where.counts_averages = counts_averages;
  std::memcpy(args_.data(), &where, sizeof where);
  ++num_launches;
  cuda_->launch(info_.rule, info_.dtype, full_, args_.data(), info_.device, info_.stream);
}

void Table::update_captured(const StepInfo& info) {
  if (info.capturing) throw std::runtime_error("update_captured() is no part of a graph: call it outside");
  bool any = false, none = true;
  for (const Captured& captured : captured_) {
    if (captured.options_size == 0) continue;
    any = true;
    if (captured.options_size != info.options_size) continue;  // of an earlier graph, before groups were added
    none = false;
    upload(info, captured.memory + captured.options_at, info.options, info.options_size);
  }
  if (any && none) throw std::runtime_error("the number of parameter groups has changed since the graph was captured");
}

}  // namespace cuda
}  // namespace fusedopt
