#!/bin/sh
# Takes out of a virtual environment what no process of ours opens: `slim.sh VENV`.
#
# A wheel holds no links, so llama.cpp's libraries lie in it three times over, and once more beside.
set -eu

packages=$(echo "${1:?which virtual environment}"/lib/python3*/site-packages)
cd "$packages"
if [ -d llama_cpp/lib ]; then
  for whole in llama_cpp/lib/lib*.so.*.*.*; do
    file=$(basename "$whole")
    stem=${file%%.so.*}.so
    major=${file#"$stem".}
    ln -sf "$file" "llama_cpp/lib/$stem.${major%%.*}"
    ln -sf "$file" "llama_cpp/lib/$stem"
  done
  rm -rf lib include bin
fi
find . -type d -name tests -path '*numpy*' -prune -exec rm -rf {} +
