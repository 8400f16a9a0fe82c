// Tiles in shared memory: how a block brings its input there, each byte once, 16 at a time, and takes NCHW outputs back.
#pragma once

#include "cuda/kernels/device.cuh"

namespace dwconv::cuda {

// channels_last: rows x columns pixels of `slab` channels, [row][column][channel], zeros outside the image and past its channels.
// `image` points at the slab's first channel of the image's first pixel; `channels` are left from there.
template <class T>
DWCONV_DEVICE void stage_pixels(T* tile, const T* image, int rows, int y0, int x0, const Divisor& columns, const Divisor& chunks,
                                int in_h, int in_w, int64_t stride_h, int stride_w, int slab, int channels, bool aligned) {
  // A thread keeps its chunk and goes from pixel to pixel in equal steps, so that nothing is divided on the way.
  const int slot = quotient(thread_index(), chunks), slots = quotient(block_size(), chunks);
  const int channel = (thread_index() - slot * chunks.divisor) * (aligned ? kChunkValues<T> : 1);
  const int step_rows = quotient(slots, columns), step_columns = slots - step_rows * columns.divisor;
  const bool inside = channel < channels;
  int row = quotient(slot, columns), column = slot - row * columns.divisor;
  if (slot >= slots) return;
  for (int pixel = slot; pixel < rows * columns.divisor; pixel += slots) {
    const int y = y0 + row, x = x0 + column;
    const bool valid = inside && static_cast<unsigned>(y) < static_cast<unsigned>(in_h) &&
                       static_cast<unsigned>(x) < static_cast<unsigned>(in_w);
    const T* const from = image + (valid ? y * stride_h + static_cast<int64_t>(x) * stride_w + channel : 0);
    T* const to = tile + pixel * slab + channel;
    if (aligned) {
      copy_async(to, from, valid);
    } else {
      *to = valid ? load<1>(from).value[0] : zero<T>();
    }
    column += step_columns;
    row += step_rows;
    if (column >= columns.divisor) column -= columns.divisor, ++row;
  }
}

// Elements from the multiple of 16 bytes before an address to it.
template <class T>
DWCONV_DEVICE int misalignment(const T* address) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(address) % kChunkBytes) / sizeof(T));
}

// Images, and channels (or rows) in them, of the planes (or rows) first, first + 1, ... of a batch, divided once for all.
struct ImageNumbers {
  int64_t image0;
  int inner0, count;  // channels or rows of an image
  Divisor divisor;    // by the count, up to kMostDivided

  DWCONV_DEVICE ImageNumbers(int64_t first, int64_t an_image, const Divisor& by)
      : image0(divided(first, an_image)),
        inner0(static_cast<int>(first - image0 * an_image)),
        count(static_cast<int>(an_image)),
        divisor(by) {}

  // Of first + q, q < kMostDivided.
  DWCONV_DEVICE int images_further(int q) const {
    return divisor.divisor == count ? quotient(inner0 + q, divisor) : inner0 + q >= count;
  }
  DWCONV_DEVICE int inner(int q) const { return inner0 + q - images_further(q) * count; }
  DWCONV_DEVICE int64_t offset(int q, int64_t stride_n, int64_t stride_inner) const {
    const int further = images_further(q);
    return (image0 + further) * stride_n + static_cast<int64_t>(inner0 + q - further * count) * stride_inner;
  }
};

// NCHW: a rectangle of each of several planes as segments of consecutive elements. A segment keeps its global address modulo 16
// bytes, so that whole chunks move as they lie; it is all rows of a plane where the rectangle is as wide as the plane, else one
// row.
template <class T>
struct PlaneTile {
  T* shared;
  int pitch;  // elements between segments, a multiple of a chunk's
  bool whole;
  int rows, columns;  // of the rectangle; with `whole`, columns is the plane's width
  int64_t stride_h;

  // Row r of plane q's rectangle, given the global address of the rectangle's first element.
  template <class Global>
  DWCONV_DEVICE T* row(int q, int r, const Global* first) const {
    if (whole) return shared + q * pitch + misalignment(first) + r * columns;
    return shared + (q * rows + r) * pitch + misalignment(first + r * stride_h);
  }
  DWCONV_DEVICE int segments() const { return whole ? 1 : rows; }  // of a plane
  DWCONV_DEVICE int length() const { return whole ? rows * columns : columns; }
};

// From global memory. first(q) is the address of plane q's rectangle. Chunks that the plane contains move whole, also where they
// reach into a neighbouring row; `before` and `after` are the elements of the plane before and behind the rectangle's first
// element.
template <class T, class First>
DWCONV_DEVICE void stage_planes(const PlaneTile<T>& tile, int planes, int64_t before, int64_t after, const Divisor& chunks,
                                First first) {
  const int segments = tile.segments(), length = tile.length();
  for (int i = thread_index(); i < planes * segments * chunks.divisor; i += block_size()) {
    const int segment = quotient(i, chunks);
    const int plane = tile.whole ? segment : segment / segments;
    const int64_t start = tile.whole ? 0 : (segment - plane * segments) * tile.stride_h;  // from the rectangle's first element
    const T* const base = first(plane);
    const int element = (i - segment * chunks.divisor) * kChunkValues<T> - misalignment(base + start);
    if (element >= length) continue;
    T* const to = tile.shared + segment * tile.pitch + misalignment(base + start) + element;
    if (start + element + before >= 0 && start + element + kChunkValues<T> <= after) {
      copy_async(to, base + start + element, true);
    } else {
      for (int k = most(0, -element); k < least(kChunkValues<T>, length - element); ++k) {
        to[k] = load<1>(base + start + element + k).value[0];
      }
    }
  }
}

// NCHW: rows x columns of each of several planes, element by element, zeros outside.
template <class T, class Plane>
DWCONV_DEVICE void stage_padded_planes(T* tile, int planes, int rows, const Divisor& columns, int pitch, int y0, int x0,
                                       int height, int width, int64_t stride_h, Plane plane) {
  for (int i = thread_index(); i < planes * rows * columns.divisor; i += block_size()) {
    const int line = quotient(i, columns), column = i - line * columns.divisor, q = line / rows;
    const int y = y0 + line - q * rows, x = x0 + column;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    tile[line * pitch + column] = inside ? load<1>(plane(q) + y * stride_h + x).value[0] : zero<T>();
  }
}

// Back to global memory: whole chunks where the segment has them, single elements at its ends.
template <class T, class First>
DWCONV_DEVICE void unstage_planes(const PlaneTile<T>& tile, int planes, const Divisor& chunks, First first) {
  const int segments = tile.segments(), length = tile.length();
  for (int i = thread_index(); i < planes * segments * chunks.divisor; i += block_size()) {
    const int segment = quotient(i, chunks);
    const int plane = tile.whole ? segment : segment / segments;
    const int64_t start = tile.whole ? 0 : (segment - plane * segments) * tile.stride_h;
    T* const base = first(plane);
    const int element = (i - segment * chunks.divisor) * kChunkValues<T> - misalignment(base + start);
    if (element >= length) continue;
    const T* const from = tile.shared + segment * tile.pitch + misalignment(base + start) + element;
    if (element >= 0 && element + kChunkValues<T> <= length) {
      store(base + start + element, *reinterpret_cast<const Vector<T, kChunkValues<T>>*>(from));
    } else {
      for (int k = most(0, -element); k < least(kChunkValues<T>, length - element); ++k) {
        store(base + start + element + k, Vector<T, 1>{{from[k]}});
      }
    }
  }
}

}  // namespace dwconv::cuda
