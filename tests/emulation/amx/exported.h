// How the functions of this folder are called from Python.
#pragma once

#define EXPORTED extern "C" __attribute__((visibility("default")))
