"""What the processes of `forked` have imported before they begin. Nothing here may start a thread: only one of them is forked."""

import gc
import os

import deepspeed.runtime.zero.muon.muon_optimizer  # compiles as it is imported, which takes seconds
import deepspeed.utils.nvtx
import diffusers.pipelines  # noqa: F401
import logged_runs  # noqa: F401
import noted  # noqa: F401
import peft  # noqa: F401
import ragged  # noqa: F401
import scenarios  # noqa: F401
import text_runs  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
from diffusers import AutoencoderKL, FluxFillPipeline, StableDiffusion3Pipeline  # noqa: F401
from transformers import (  # noqa: F401
    AutoTokenizer,
    CLIPTextModelWithProjection,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen3VLForConditionalGeneration,
    SiglipVisionModel,
    T5EncoderModel,
)

import cli  # noqa: F401
import lit_rl.command_line.run  # noqa: F401

if len(os.listdir("/proc/self/task")) > 1:
    raise RuntimeError("an import has started a thread, which a fork would leave behind")

deepspeed.utils.nvtx.enable_nvtx = False  # marks for NVIDIA's profiler, two calls around each of DeepSpeed's

gc.freeze()  # what is there by now stays: a fork's collector neither looks through it nor copies its pages
