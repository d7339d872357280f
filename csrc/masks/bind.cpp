// The Python module mimkernels_masks: numpy arrays in and out, the GIL released while masks are drawn, no torch.
// mimkernels/data/masks checks what a call means; here stands what keeps it inside its memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "masks/samplers.h"

namespace py = pybind11;

namespace mimkernels::masks {
namespace {

constexpr int kLargestSide = 1 << 15;  // so that no product of two sides leaves int

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Pair = std::pair<double, double>;

void require(bool holds, const char* fact) {
  if (!holds) throw std::invalid_argument(fact);
}

void require_grid(int frames, int height, int width) {
  require(frames >= 1 && height >= 1 && width >= 1, "the sides of a grid are at least 1");
  require(frames <= kLargestSide && height <= kLargestSide && width <= kLargestSide,
          "the sides of a grid are at most 32768");
}

Batch batch_of(const Array<uint32_t>& samples, uint64_t seed, uint64_t epoch) {
  require(samples.ndim() == 1, "samples are one-dimensional");
  return {{samples.data(), samples.data() + samples.size()}, seed, epoch};
}

uint8_t* bytes(py::array_t<bool>& array) {
  return reinterpret_cast<uint8_t*>(array.mutable_data());
}

py::array_t<bool> py_blocks(const Array<uint32_t>& samples, uint64_t seed, uint64_t epoch,
                            std::pair<int, int> grid, const Array<double>& targets,
                            const Array<int32_t>& picks, bool whole, double min_patches,
                            double max_patches, Pair log_aspect, bool exact) {
  const auto [height, width] = grid;
  require_grid(1, height, width);
  require(targets.ndim() == 2 && targets.shape(0) > 0 && targets.shape(1) == 2,
          "targets are [R, 2]");
  require(picks.ndim() == 1 && picks.size() == samples.size(), "there is one pick for each sample");
  require(min_patches >= 0 && min_patches <= double(height) * width,
          "a block has 0 to all patches");
  require(max_patches <= double(height) * width, "max_patches is at most all patches");
  // Aspects beyond leave int where the side of a block is rounded; no grid has them.
  require(log_aspect.first > -20 && log_aspect.second < 20,
          "aspect ratios are within e^-20 to e^20");
  BlockParams params{
      height, width, {}, whole, min_patches, max_patches, {log_aspect.first, log_aspect.second},
      exact};
  for (py::ssize_t i = 0; i < targets.shape(0); ++i) {
    const Range range{targets.at(i, 0), targets.at(i, 1)};
    for (double bound : {range.low, range.high}) {
      require(bound >= 0 && bound <= double(height) * width, "a target is 0 to all patches");
    }
    params.targets.push_back(range);
  }
  for (py::ssize_t i = 0; i < picks.size(); ++i) {
    require(picks.at(i) < targets.shape(0), "a pick is the number of a target, or -1");
  }
  const Batch batch = batch_of(samples, seed, epoch);
  py::array_t<bool> out({samples.size(), py::ssize_t(height), py::ssize_t(width)});
  uint8_t* const cells = bytes(out);
  {
    py::gil_scoped_release released;
    blocks(batch, params, picks.data(), cells);
  }
  return out;
}

py::array_t<bool> py_rectangles(const Array<uint32_t>& samples, uint64_t seed, uint64_t epoch,
                                std::pair<int, int> grid, int count, Pair log_aspect,
                                bool any_corner, bool roll) {
  const auto [height, width] = grid;
  require_grid(1, height, width);
  require(count >= 0 && count <= height * width, "a rectangle has 0 to all patches");
  require(log_aspect.first > -20 && log_aspect.second < 20,
          "aspect ratios are within e^-20 to e^20");
  const RectangleParams params{height,     width, count, {log_aspect.first, log_aspect.second},
                               any_corner, roll};
  const Batch batch = batch_of(samples, seed, epoch);
  py::array_t<bool> out({samples.size(), py::ssize_t(height), py::ssize_t(width)});
  uint8_t* const cells = bytes(out);
  {
    py::gil_scoped_release released;
    rectangles(batch, params, cells);
  }
  return out;
}

py::tuple py_multiblock(const Array<uint32_t>& samples, uint64_t seed, uint64_t epoch,
                        std::pair<int, int> grid, std::pair<int, int> target,
                        std::pair<int, int> context, int targets, int min_keep, bool last_row,
                        bool overlap) {
  const auto [height, width] = grid;
  require_grid(1, height, width);
  for (const auto& [h, w] : {target, context}) {
    require(h >= 1 && w >= 1 && h < height && w < width, "a block is smaller than the grid");
  }
  require(targets >= 0, "targets is at least 0");
  const MultiblockParams params{height,
                                width,
                                {1, target.first, target.second},
                                {1, context.first, context.second},
                                targets,
                                min_keep,
                                last_row,
                                overlap};
  const Batch batch = batch_of(samples, seed, epoch);
  py::array_t<bool> mask({samples.size(), py::ssize_t(height), py::ssize_t(width)});
  py::array_t<int32_t> corners({samples.size(), py::ssize_t(targets), py::ssize_t(2)});
  uint8_t* const cells = bytes(mask);
  int32_t* const corner = corners.mutable_data();
  {
    py::gil_scoped_release released;
    multiblock(batch, params, cells, corner);
  }
  return py::make_tuple(mask, corners);
}

py::array_t<bool> py_multiblock3d(const Array<uint32_t>& samples, uint64_t seed, uint64_t epoch,
                                  std::tuple<int, int, int> grid, std::tuple<int, int, int> block,
                                  int blocks, int context_frames, int tries) {
  const auto [frames, height, width] = grid;
  const auto [t, h, w] = block;
  require_grid(frames, height, width);
  require(t >= 1 && h >= 1 && w >= 1 && t <= frames && h <= height && w <= width,
          "a block fits the grid");
  require(blocks >= 0 && context_frames >= 1, "blocks is at least 0, context_frames at least 1");
  const Multiblock3dParams params{{frames, height, width}, {t, h, w}, blocks, context_frames};
  const Batch batch = batch_of(samples, seed, epoch);
  py::array_t<bool> out(
      {samples.size(), py::ssize_t(frames), py::ssize_t(height), py::ssize_t(width)});
  uint8_t* const cells = bytes(out);
  int64_t failed = -1;
  {
    py::gil_scoped_release released;
    failed = multiblock3d(batch, params, tries, cells);
  }
  if (failed >= 0) {
    throw std::runtime_error("sample " + std::to_string(batch.samples[failed]) + ": none of " +
                             std::to_string(tries) + " draws left a patch visible");
  }
  return out;
}

py::array_t<bool> py_thin(const Array<bool>& mask, const Array<uint32_t>& samples, uint64_t seed,
                          uint64_t epoch, int count, bool second) {
  require(mask.ndim() == 2 && mask.shape(0) == samples.size(), "mask is [samples, tokens]");
  require(mask.shape(1) <= int64_t{1} << 30, "mask has at most 2^30 tokens");
  require(count >= 0, "count is at least 0");
  const Batch batch = batch_of(samples, seed, epoch);
  py::array_t<bool> out({mask.shape(0), mask.shape(1)});
  std::copy(mask.data(), mask.data() + mask.size(), out.mutable_data());
  uint8_t* const cells = bytes(out);
  {
    py::gil_scoped_release released;
    thin(batch, mask.shape(1), count, second ? Purpose::kSecondSubset : Purpose::kSubset, cells);
  }
  return out;
}

py::tuple py_ids(const Array<bool>& mask) {
  require(mask.ndim() == 2, "mask is [samples, tokens]");
  const py::ssize_t rows = mask.shape(0), tokens = mask.shape(1);
  py::array_t<int64_t> order({rows, tokens}), restore({rows, tokens}), zeros(rows);
  const auto* const cells = reinterpret_cast<const uint8_t*>(mask.data());
  int64_t* const at[] = {order.mutable_data(), restore.mutable_data(), zeros.mutable_data()};
  {
    py::gil_scoped_release released;
    ids(cells, rows, tokens, at[0], at[1], at[2]);
  }
  return py::make_tuple(order, restore, zeros);
}

}  // namespace
}  // namespace mimkernels::masks

PYBIND11_MODULE(mimkernels_masks, m) {
  using namespace mimkernels::masks;
  m.doc() = "Block masks for data-loader workers; mimkernels.data.masks is the interface.";
  m.def("blocks", &py_blocks, py::arg("samples"), py::arg("seed"), py::arg("epoch"), py::kw_only(),
        py::arg("grid"), py::arg("targets"), py::arg("picks"), py::arg("whole"),
        py::arg("min_patches"), py::arg("max_patches"), py::arg("log_aspect"), py::arg("exact"));
  m.def("rectangles", &py_rectangles, py::arg("samples"), py::arg("seed"), py::arg("epoch"),
        py::kw_only(), py::arg("grid"), py::arg("count"), py::arg("log_aspect"),
        py::arg("any_corner"), py::arg("roll"));
  m.def("multiblock", &py_multiblock, py::arg("samples"), py::arg("seed"), py::arg("epoch"),
        py::kw_only(), py::arg("grid"), py::arg("target"), py::arg("context"), py::arg("targets"),
        py::arg("min_keep"), py::arg("last_row"), py::arg("overlap"));
  m.def("multiblock3d", &py_multiblock3d, py::arg("samples"), py::arg("seed"), py::arg("epoch"),
        py::kw_only(), py::arg("grid"), py::arg("block"), py::arg("blocks"),
        py::arg("context_frames"), py::arg("tries"));
  m.def("thin", &py_thin, py::arg("mask"), py::arg("samples"), py::arg("seed"), py::arg("epoch"),
        py::kw_only(), py::arg("count"), py::arg("second"));
  m.def("ids", &py_ids, py::arg("mask"));
}
