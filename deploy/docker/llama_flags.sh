#!/bin/sh
# Prints the CMake flags for a llama.cpp that runs on every processor of a class, not only on the
# one that builds it: `llama_flags.sh amd64|arm64 [v2|v3]`.
#
# GGML_NATIVE=OFF alone still means AVX2 on amd64, which cash registers and kiosks often lack.
set -eu

portable="-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"
case "${1:?which architecture: amd64 or arm64}" in
  amd64)
    case "${2:-v2}" in
      v2)
        echo "$portable -DGGML_SSE42=ON -DGGML_AVX=OFF -DGGML_AVX2=OFF" \
          "-DGGML_FMA=OFF -DGGML_F16C=OFF -DGGML_BMI2=OFF"
        ;;
      v3)
        echo "$portable -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON" \
          "-DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
        ;;
      *)
        echo "no level $2 of amd64: v2 (any since 2009) or v3 (AVX2)" >&2
        exit 64
        ;;
    esac
    ;;
  arm64)
    echo "$portable -DGGML_CPU_ARM_ARCH=armv8-a"
    ;;
  *)
    echo "no architecture $1: amd64 or arm64" >&2
    exit 64
    ;;
esac
