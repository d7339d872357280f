// How the kernels in this folder are called from Python: C functions that return an error's text.
#pragma once

#include <exception>
#include <string>

#include "cuda/device.cuh"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The text of the error that `start` ends with, or an empty one; it lasts until the next call.
template <typename Start>
const char* error_of(Start start) {
  static std::string text;
  try {
    const cudaError_t error = start();
    text = error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::exception& fault) {
    text = fault.what();
  }
  return text.c_str();
}
