"""python cli.py fit|validate|test|predict --config run.yaml [--ckpt_path last] [--model.lr ...]"""

from __future__ import annotations

import sys

COMMANDS = {
    "fit": "train; continue an interrupted run with --ckpt_path last",
    "validate": "score the held-out prompts, with a checkpoint's weights if --ckpt_path is given",
    "test": "as validate, through Lightning's test loop",
    "predict": "render prompts into a folder (--images.output_dir)",
}

HELP = """usage: python cli.py {command} --config FILE [--config FILE ...] [--KEY VALUE ...]

{commands}

what a run is
  --config FILE             YAML file; several are laid over each other, later ones win. configs/base/*.yaml say where it runs
                            (cpu, one_gpu, ddp, fsdp, deepspeed_zero2, ...), configs/<method>/*.yaml what is trained
  --ckpt_path PATH|last|best  continue exactly where this checkpoint stopped; `last` finds the newest one of the run, `best` the one that a
                            ModelCheckpoint with a monitor calls so
  --run.dir DIR, --run.name NAME   all that the run writes is in DIR/NAME: logs, checkpoints, best, export, samples, predictions
  --run.callbacks.NAME null leave out a callback that every run has: progress, learning_rate, throughput, samples, newest, graceful_stop,
                            rng_state, heartbeat; {{...}} in place of null sets options, one of its kind in trainer.callbacks replaces it
  --seed_everything INT     one seed for prompts, rollouts, minibatches and evaluation
  --print_config            show the run as one YAML, every default included, and stop

every key of the YAML is also an option, for example
  --model.init_args.group_size 16             --trainer.max_epochs 300           --trainer.devices 8
  --model.init_args.policy.init_args.pretrained PATH                             --trainer.precision bf16-mixed
  --trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor           --data.init_args.train PATH

what a class takes
  --model.help lit_rl.methods.flow_grpo.FlowGRPO            any method, by its dotted path, with what its components take
  --config run.yaml --model.policy.help                     the class that the run names there
  --data.help datamodules.prompts.PromptFiles               any datamodule
  --trainer.callbacks.help callbacks.reward_scoring.RewardScoring
  --help all                                                every option of the trainer (takes some seconds)

reward servers: python -m lit_rl.rewards.launch --help"""


def help_page(command: str | None) -> str:
    """The page that people need, without the seconds it takes to import torch."""
    names = [command] if command else list(COMMANDS)
    lines = "\n".join(f"  {name:<10}{COMMANDS[name]}" for name in names)
    return HELP.format(command=command or "{fit|validate|test|predict}", commands=lines)


def main() -> None:
    args = sys.argv[1:]
    command = args[0] if args and args[0] in COMMANDS else None
    if not args or args in (["-h"], ["--help"]) or (command and args[1:] in ([], ["-h"], ["--help"])):
        print(help_page(command))
        return
    if command and args[1:] == ["--help", "all"]:
        sys.argv[-1:] = []
    from lit_rl.own_code import use_working_folder

    use_working_folder()
    from lit_rl.command_line.early import early_mistake
    from lit_rl.errors import ConfigError
    from lit_rl.net.env_file import use_env_file

    try:
        use_env_file()
        mistake = early_mistake(sys.argv)  # before the seconds of the imports that follow
    except ConfigError as error:
        mistake = str(error)
    if mistake:
        sys.stderr.write(f"error: {mistake}\n")
        raise SystemExit(2)
    from lit_rl.command_line.imports import quick_imports

    with quick_imports():
        from lit_rl.command_line.components import asked_class, components_page
        from lit_rl.command_line.options import with_help_classes
        from lit_rl.command_line.run import CLI

    sys.argv[1:] = with_help_classes(sys.argv[1:])

    try:
        CLI()
    except SystemExit as done:
        if not done.code and (method := asked_class(sys.argv)) is not None:
            print(f"\n{components_page(method)}")
        raise


if __name__ == "__main__":
    main()
