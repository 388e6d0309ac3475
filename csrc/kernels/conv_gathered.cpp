// Convolutions as products: integers of a block of output pixels are gathered into rows, multiplied
// and stored.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <csrc/kernels/conv_input.h>

#include <atomic>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kQuantizeElements = 1 << 14;  // of a task
constexpr int64_t kTaskProducts = 1 << 21;      // of a task: about 10 us
constexpr int64_t kGatheredBytes = 1 << 18;     // of a block of rows: part of a core's L2
constexpr int64_t kPanelTiles = kPanelOutputs / kTileOutputs;

// The padded integer copies of all samples: int8 or int16 [B, padded h, padded w, C].
at::Tensor integer_images(const ConvShape& s, const ConvInput& input, bool wide) {
  const at::Tensor images = at::empty({s.batch, s.padded.h, s.padded.w, s.channels},
                                      at::TensorOptions(wide ? at::kShort : at::kChar));
  if (has_padding(s)) {
    for (int64_t b = 0; b < s.batch; ++b) images.select(0, b).fill_(input.fill(b));
  }
  constexpr int64_t kPixels = 64;  // as many as the kernel takes at once
  const int64_t step = std::max(kQuantizeElements / s.channels / kPixels, int64_t{1}) * kPixels;
  const int64_t chunks = (s.size.area() + step - 1) / step;
  const int64_t image_size = s.padded.area() * s.channels;
  std::atomic<bool> finite{true};
  at::parallel_for(0, s.batch * chunks, 1, [&](int64_t begin, int64_t end) {
    bool own = true;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / chunks, first = i % chunks * step;
      QuantizeImage q{};
      q.x = input.values(b);
      q.codes = input.codes(b);
      q.channels_last = input.channels_last();
      q.channels = s.channels;
      q.size = s.size;
      q.before = s.before;
      q.padded_width = s.padded.w;
      q.first = first;
      q.last = std::min(first + step, s.size.area());
      q.grid = input.grid(b);
      q.narrow = wide ? nullptr : images.mutable_data_ptr<int8_t>() + b * image_size;
      q.wide = wide ? images.mutable_data_ptr<int16_t>() + b * image_size : nullptr;
      q.finite = &own;
      quantize_image(q);
    }
    if (!own) finite = false;
  });
  if (!finite) input.raise_if_not_finite();
  return images;
}

// Ones on padding, zeros inside: what fills the rows of the correction.
at::Tensor padding_image(const ConvShape& s, bool wide) {
  const at::Tensor image = at::ones({s.padded.h, s.padded.w, s.channels},
                                    at::TensorOptions(wide ? at::kShort : at::kChar));
  image.narrow(0, s.before.h, s.size.h).narrow(1, s.before.w, s.size.w).zero_();
  return image;
}

// How a row is gathered: the places of packed columns, merged where both sides go on.
std::vector<ConvRun> gather_runs(const ConvShape& s, const BlockLayout& layout,
                                 int64_t group_size) {
  const int64_t taps = s.kernel.area();
  const std::vector<int64_t> order = gathered_columns(layout.columns, taps, group_size);
  std::vector<ConvRun> runs;
  for (int64_t i = 0; i < layout.columns; ++i) {
    const int64_t tap = order[i] % taps, y = tap / s.kernel.w, x = tap % s.kernel.w;
    const int64_t pixel = y * s.dilation.h * s.padded.w + x * s.dilation.w;
    const int64_t from = pixel * s.channels + order[i] / taps;
    const int64_t to =
        i / layout.group_size * layout.group_blocks * kBlockInputs + i % layout.group_size;
    if (!runs.empty() && runs.back().from + runs.back().count == from &&
        runs.back().to + runs.back().count == to) {
      ++runs.back().count;
    } else {
      runs.push_back({from, to, 1});
    }
  }
  return runs;
}

// One thread's rows and what belongs to them.
struct Workspace {
  Workspace(int64_t rows, const BlockLayout& layout, bool wide)
      : integers(rows * layout.blocks * kBlockInputs * (wide ? 2 : 1)),
        sums(rows * layout.groups),
        scale(rows),
        zero(rows) {}

  std::vector<int8_t> integers;  // or int16
  std::vector<int32_t> sums;
  std::vector<float> scale;
  std::vector<float> zero;
  std::vector<float> correction;  // [rows, outputs], where there is one
  std::vector<float> values;      // the same
  bool finite = true;
};

// A task: rows of one sample, and panels [first_panel, last_panel) counted through all groups.
struct Task {
  int64_t sample;
  int64_t first_row;
  int64_t rows;
  int64_t first_panel;
  int64_t last_panel;
};

class GatheredConv {
 public:
  GatheredConv(const ConvShape& shape, const ConvInput& input, std::vector<Prepacked> weights,
               int64_t group_size, bool wide, const ConvOutput& output)
      : s_(shape),
        input_(input),
        weights_(std::move(weights)),
        layout_(weights_[0].view().layout),
        wide_(wide),
        output_(output),
        outputs_(shape.outputs / shape.groups),
        panels_((outputs_ + kPanelOutputs - 1) / kPanelOutputs) {
    const bool pointwise = !wide_ && s_.kernel.area() == 1 && s_.stride.area() == 1 &&
                           !has_padding(s_) && s_.groups == 1;
    of_rows_ = pointwise && input_.channels_last() && input_.has_zero();
    if (of_rows_) return;
    images_ = integer_images(s_, input_, wide_);
    runs_ = gather_runs(s_, layout_, group_size);
    if (!input_.pads_exactly()) padding_ = padding_image(s_, wide_);
    in_place_ = pointwise && depth() == s_.channels;
  }

  void run() const {
    const int64_t row_bytes = std::max<int64_t>(depth() * (wide_ ? 2 : 1), 1);
    const int64_t most = std::clamp<int64_t>(kGatheredBytes / row_bytes / 6 * 6, 24, 96);
    const int64_t rows = std::min(most, s_.out.area());
    const int64_t blocks = (s_.out.area() + rows - 1) / rows, panels = panels_ * s_.groups;
    // Few rows: outputs are cut too. No output depends on how.
    const int64_t wanted = 2 * at::get_num_threads() / (s_.batch * blocks);
    const int64_t parts = std::clamp<int64_t>(at::get_num_threads() == 1 ? 1 : wanted, 1, panels);
    const int64_t products = rows * depth() * kPanelOutputs * panels / parts;
    const int64_t grain = std::max<int64_t>(kTaskProducts / std::max<int64_t>(products, 1), 1);
    std::atomic<bool> finite{true};
    at::parallel_for(0, s_.batch * blocks * parts, grain, [&](int64_t begin, int64_t end) {
      Workspace own(rows, layout_, wide_);
      if (!input_.pads_exactly()) own.correction.resize(rows * outputs_);
      if (!stores_directly()) own.values.resize(rows * outputs_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % parts, block = i / parts % blocks, first = block * rows;
        run_task({i / parts / blocks, first, std::min(rows, s_.out.area() - first),
                  part * panels / parts, (part + 1) * panels / parts},
                 own);
      }
      if (!own.finite) finite = false;
    });
    if (!finite) input_.raise_if_not_finite();
  }

 private:
  int64_t depth() const { return layout_.blocks * kBlockInputs; }

  bool corrects(int64_t sample) const {
    return has_padding(s_) && input_.fill_error(sample) != 0.0f;
  }

  // Rows of the product are what the output holds.
  bool stores_directly() const {
    return output_.channels_last && s_.groups == 1 && input_.pads_exactly();
  }

  // The product of rows that lie in the input as they are.
  PackedProduct rows_of_input(const Task& task, Workspace& own) const {
    const IntegerGrid& grid = input_.grid(task.sample);
    const int64_t first = task.first_row * s_.channels;
    QuantizeRows q{};
    q.layout = layout_;
    q.rows = task.rows;
    if (input_.codes(task.sample) != nullptr)
      q.codes = input_.codes(task.sample) + first;
    else
      q.x = input_.values(task.sample) + first;
    q.scale = grid.scale;
    q.zero_point = grid.zero_point;
    q.max_code = grid.max_code;
    q.shift = grid.shift;
    q.narrow = own.integers.data();
    q.sums = own.sums.data();
    q.finite = &own.finite;
    quantize_rows(q);
    return product_of(task.rows, q.narrow, nullptr, q.sums);
  }

  PackedProduct product_of(int64_t rows, const int8_t* narrow, const int16_t* wide,
                           const int32_t* sums) const {
    PackedProduct p{};
    p.rows = rows;
    p.narrow = narrow;
    p.wide = wide;
    p.sums = sums;
    p.tier = cpu_tier();
    p.out_stride = outputs_;
    return p;
  }

  void run_task(const Task& task, Workspace& own) const {
    for (int64_t panel = task.first_panel; panel < task.last_panel;) {
      const int64_t group = panel / panels_;
      const int64_t last = std::min(task.last_panel, (group + 1) * panels_);
      run_group(task, group, panel - group * panels_, last - group * panels_, own);
      panel = last;
    }
  }

  // Gathers rows, counted from element `first` of `images`, and gives the product that they belong
  // to.
  PackedProduct gathered(const Task& task, const at::Tensor& images, int64_t first,
                         Workspace& own) const {
    GatherRows g{};
    g.layout = layout_;
    g.runs = runs_.data();
    g.run_count = static_cast<int64_t>(runs_.size());
    g.channels = s_.channels;
    g.padded_width = s_.padded.w;
    g.stride = s_.stride;
    g.out_width = s_.out.w;
    g.first = task.first_row;
    g.rows = task.rows;
    g.sums = own.sums.data();
    if (wide_) {
      g.wide_image = images.const_data_ptr<int16_t>() + first;
      g.wide = reinterpret_cast<int16_t*>(own.integers.data());
    } else {
      g.narrow_image = images.const_data_ptr<int8_t>() + first;
      g.narrow = own.integers.data();
    }
    if (in_place_) {
      g.runs = nullptr;
      g.narrow = const_cast<int8_t*>(g.narrow_image) + task.first_row * s_.channels;
    }
    gather_rows(g);
    return product_of(task.rows, g.narrow, g.wide, g.sums);
  }

  void run_group(const Task& task, int64_t group, int64_t first_panel, int64_t last_panel,
                 Workspace& own) const {
    const int64_t channel = group * (s_.channels / s_.groups), output = group * outputs_;
    const bool corrects = this->corrects(task.sample);
    const auto choose = [&](PackedProduct& p, float scale, float zero, float* out) {
      p.weight = weights_[group].view();
      p.first_tile = first_panel * kPanelTiles;
      p.last_tile =
          std::min(last_panel * kPanelTiles, (outputs_ + kTileOutputs - 1) / kTileOutputs);
      std::fill(own.scale.begin(), own.scale.end(), scale);
      std::fill(own.zero.begin(), own.zero.end(), zero);
      p.a_scale = own.scale.data();
      p.a_zero = zero != 0.0f ? own.zero.data() : nullptr;
      p.one_grid = true;
      p.out = out;
    };
    const float scale = input_.scale(task.sample);
    if (corrects) {
      PackedProduct p = gathered(task, padding_, channel, own);
      choose(p, scale * input_.fill_error(task.sample), 0.0f, own.correction.data());
      packed_product(p);
    }
    PackedProduct p =
        of_rows_
            ? rows_of_input(task, own)
            : gathered(task, images_, task.sample * s_.padded.area() * s_.channels + channel, own);
    choose(p, scale, input_.zero(task.sample), own.values.data());
    p.bias = output_.bias == nullptr ? nullptr : output_.bias + output;
    p.residual = corrects ? own.correction.data() : nullptr;
    p.epilogue = corrects ? Epilogue::none : output_.epilogue;  // it follows the correction
    const int64_t first_pixel = task.sample * s_.out.area() + task.first_row;
    if (output_.grid != nullptr) {
      p.out = nullptr;
      output_.grid->apply_to(p, output_.out);
      p.codes += first_pixel * s_.outputs;
      return packed_product(p);
    }
    auto* const out = output_.out.mutable_data_ptr<float>();
    if (stores_directly()) {
      p.out = out + first_pixel * s_.outputs;
      p.streams = streams_to(out, s_.batch * s_.out.area(), s_.outputs);
      return packed_product(p);
    }
    packed_product(p);
    const int64_t first = first_panel * kPanelOutputs;
    StoreRows store{own.values.data() + first,
                    outputs_,
                    task.rows,
                    std::min(last_panel * kPanelOutputs, outputs_) - first,
                    nullptr,
                    1,
                    s_.out.area(),
                    corrects ? output_.epilogue : Epilogue::none};
    if (output_.channels_last)
      std::tie(store.row_step, store.output_step) = std::pair{s_.outputs, 1};
    store.out = out + task.sample * s_.outputs * s_.out.area() + task.first_row * store.row_step +
                (output + first) * store.output_step;
    store_rows(store);
  }

  const ConvShape s_;
  const ConvInput& input_;
  const std::vector<Prepacked> weights_;  // [groups]
  const BlockLayout layout_;
  const bool wide_;
  const ConvOutput& output_;
  const int64_t outputs_;  // of a group
  const int64_t panels_;   // of a group
  at::Tensor images_;
  at::Tensor padding_;
  std::vector<ConvRun> runs_;
  bool of_rows_;
  bool in_place_ = false;
};

}  // namespace

void run_gathered(const ConvShape& shape, const ConvInput& input, std::vector<Prepacked> weights,
                  int64_t group_size, bool wide, const ConvOutput& output) {
  GatheredConv(shape, input, std::move(weights), group_size, wide, output).run();
}

}  // namespace torchquant
