"""What a launch says that fails (csrc/primitives/ptx/launch.h): the file itself, compiled against a
CUDA runtime that does as it is told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = r"""
#pragma once
#include <cstddef>
#include <cstdint>
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __shfl_sync(mask, value, lane) (value)
struct dim3 {
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
static dim3 threadIdx(0), blockIdx(0), gridDim(0);
enum cudaError_t { cudaSuccess, cudaErrorIllegalAddress, cudaErrorInvalidConfiguration,
                   cudaErrorInvalidValue };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
inline cudaError_t last = cudaSuccess, attribute = cudaSuccess, started = cudaSuccess;
inline int launches = 0;
inline cudaError_t cudaPeekAtLastError() { return last; }
inline cudaError_t cudaGetLastError() { cudaError_t was = last; last = cudaSuccess; return was; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return last = attribute; }
inline cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  ++launches;
  return last = started;
}
inline const char* cudaGetErrorName(cudaError_t error) {
  const char* names[] = {"none", "cudaErrorIllegalAddress", "cudaErrorInvalidConfiguration",
                         "cudaErrorInvalidValue"};
  return names[error];
}
inline const char* cudaGetErrorString(cudaError_t) { return "as told"; }
"""
PROGRAM = r"""
#include <cuda_runtime.h>
#include <cstdio>
#include "primitives/launch.h"

namespace sink_attention::cuda::sm80 {
template <class Element, int kHeadDim>
struct Kernel {
  struct Config {
    static constexpr int kThreads = 128, kMinBlocks = 1, kSharedBytes = 65536;
  };
  using Params = int;
  static void run(int, char*) {}
};
}  // namespace sink_attention::cuda::sm80

namespace sink_attention::primitives {
char shared[65536];  // what kernel_entry declares
}

using namespace sink_attention;

void launch(int blocks) {
  try {
    primitives::launch<cuda::sm80::Kernel<float, 64>>(1, {blocks, 2, 3}, nullptr);
    std::puts("started");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}

int main() {
  launch(8);
  launch(0);
  std::printf("%d launches\n", launches);
  last = cudaErrorIllegalAddress;
  launch(8);
  std::printf("%d launches\n", launches);
  attribute = cudaErrorInvalidValue;
  launch(8);
  attribute = cudaSuccess;
  started = cudaErrorInvalidConfiguration;
  launch(8);
  started = cudaSuccess;
  launch(8);
}
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "main.cpp").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-w", f"-I{folder}", f"-I{ROOT / 'csrc'}", "main.cpp"]
    subprocess.run([*command, "-o", "main"], cwd=folder, check=True)
    return subprocess.run(
        [folder / "main"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


LAUNCH = (
    "the launch of sink_attention::cuda::sm80::Kernel<float, 64>, grid 8 x 2 x 3, block 128, 65536 "
    "bytes of dynamic shared memory: "
)


def test_an_empty_grid_starts_nothing(lines: list[str]) -> None:
    assert lines[:3] == ["started", "started", "1 launches"]


def test_an_earlier_error_is_not_ours(lines: list[str]) -> None:
    assert lines[3] == (
        f"sink_attention_ext: an earlier CUDA error, found before {LAUNCH}"
        "cudaErrorIllegalAddress, as told"
    )
    assert lines[4] == "1 launches"


def test_a_launch_that_fails_is_named(lines: list[str]) -> None:
    assert lines[5] == f"sink_attention_ext: {LAUNCH}cudaErrorInvalidValue, as told"
    assert lines[6] == f"sink_attention_ext: {LAUNCH}cudaErrorInvalidConfiguration, as told"


def test_the_next_call_starts_clean(lines: list[str]) -> None:
    assert lines[7] == "started"
