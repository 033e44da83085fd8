#!/usr/bin/env bash
# Builds the image, starts vLLM and waits until it answers, trains, and takes all down again, whatever happened. Options of the run may follow:
# docker/docker_train_areal.sh --trainer.max_epochs 2 --ckpt_path last
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -f .env ]; then
  echo "error: there is no .env: cp env.example .env, and set GBOX_API_KEY in it" >&2
  exit 2
fi
# A variable as the shell or .env has it; the template's placeholders are none.
value_of() {
  local value="${!1:-}"
  [ -n "$value" ] || value="$(. ./.env && printf %s "${!1:-}")"
  case "$value" in your_*) ;; *) printf %s "$value" ;; esac
}
if [ -z "$(value_of GBOX_API_KEY)" ]; then
  echo "error: GBOX_API_KEY is not set: write your key into .env" >&2
  exit 2
fi
for name in HF_ENDPOINT HF_TOKEN; do
  value="$(value_of "$name")"
  if [ -n "$value" ]; then export "$name=$value"; fi
done
compose() { docker-compose -f docker/docker-compose.areal.yml "$@"; }
export TRAINER_OPTIONS="$*"
seconds="${VLLM_READY_SECONDS:-1260}"
trap 'compose down' EXIT
compose build
compose up -d vllm
until compose exec -T vllm curl --fail --silent http://localhost:8000/health; do
  if [ "$SECONDS" -gt "$seconds" ]; then
    echo "error: vLLM does not answer after $seconds s: docker logs vllm-cua-areal says why (a GPU that is taken, a port that is in use, a model that cannot be loaded)" >&2
    exit 1
  fi
  sleep 5
done
compose up --exit-code-from trainer trainer
