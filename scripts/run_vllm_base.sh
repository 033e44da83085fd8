#!/usr/bin/env bash
# vLLM for an agent's run: the base model, adapters loaded while it runs. Plan A: as it is, on GPUs 0-3. Plan B, GPUs shared with training:
# CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 TENSOR_PARALLEL_SIZE=8 GPU_MEMORY_UTILIZATION=0.3 scripts/run_vllm_base.sh
# More options of `vllm serve` may follow; with DRY_RUN=1 the command is printed and not run.
set -euo pipefail
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3}"
export VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_NO_USAGE_STATS=1
command=(
  vllm serve "${MODEL:-Qwen/Qwen3-VL-32B-Instruct}"
  --host "${VLLM_HOST:-127.0.0.1}" --port "${VLLM_PORT:-8000}"
  --tensor-parallel-size "${TENSOR_PARALLEL_SIZE:-4}"
  --gpu-memory-utilization "${GPU_MEMORY_UTILIZATION:-0.85}"
  --max-model-len "${MAX_MODEL_LEN:-16384}"
  --dtype "${DTYPE:-bfloat16}"
  --enable-lora --max-lora-rank "${MAX_LORA_RANK:-32}" --max-loras 2 --max-cpu-loras 4
  --limit-mm-per-prompt '{"image": 1}'
  --logprobs-mode processed_logprobs
  "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
