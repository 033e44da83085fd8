"""Writes Grafana's dashboards, which are generated and not edited: python -m deploy.dashboards

Needs grafana-foundation-sdk (extra `dev`). Each query has the data source as variable `ds`, so the files go into any Grafana.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

FOLDER = Path(__file__).parent / "grafana" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${ds}")
WIDTH, HEIGHT, COLUMNS = 8, 8, 3


class Panel(NamedTuple):
    """A graph: its title, its queries by legend, its unit and what a reader should know."""

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    about: str = ""


def canonical(name: str, title: str, about: str) -> Panel:
    """The curve of a canonical metric, one for each job."""
    return Panel(title, {"{{job_id}}": f'rl_metric{{metric="{name}"}}'}, about=about)


TRAINING = (
    canonical("reward_mean", "Mean reward", "Rises."),
    canonical("policy_loss", "Policy loss", "Falls."),
    canonical("value_loss", "Value loss (PPO)", "Falls."),
    canonical("kl_divergence", "Divergence from the reference", "Below 0.1."),
    canonical("entropy", "Entropy of the policy", "Falls slowly."),
    canonical("clip_fraction", "Clipped share", "0.1 to 0.3."),
    Panel("Reward by source", {"{{job_id}} {{source}}": "rl_reward_mean"}),
    Panel(
        "Failed share by source",
        {"{{job_id}} {{source}}": "rl_reward_failed_fraction", "{{job_id}}": "rl_unscored_fraction"},
        "percentunit",
    ),
    Panel("Groups without a difference", {"{{job_id}}": "rl_group_zero_std_ratio"}, "percentunit", "Near 1: too easy, or too hard."),
    Panel("Where the time goes", {"{{job_id}} {{phase}}": "rl_step_seconds"}, "s", "Seconds of the newest iteration."),
    Panel("Optimizer steps", {"{{job_id}}": "rl_train_step"}),
    Panel("Jobs", {"{{state}}": "rl_jobs"}),
)
SERVERS = (
    Panel("Requests a second", {"{{instance}} {{route}}": "sum by (instance, route) (rate(reward_requests_total[1m]))"}, "reqps"),
    Panel("Answers within (p95)", {
        "{{instance}}": "histogram_quantile(0.95, sum by (instance, le) (rate(reward_request_seconds_bucket[1m])))"}, "s"),
    Panel("Images waiting", {"{{instance}}": "reward_queue_images"}),
    Panel("Turned away a second", {"{{instance}} {{reason}}": "sum by (instance, reason) (rate(reward_shed_total[1m]))"}, "reqps"),
    Panel("Mean score", {"{{output}}": "sum by (output) (rate(reward_score_sum[1m])) / sum by (output) (rate(reward_score_count[1m]))"}),
    Panel("Images of a call of the scorers", {
        "{{instance}}": "rate(reward_batch_size_sum[1m]) / rate(reward_batch_size_count[1m])"}),
    Panel("Answers under way", {
        "vLLM {{instance}}": "vllm:num_requests_running", "SGLang {{instance}}": "sglang:num_running_reqs"}),
    Panel("Answers waiting", {"vLLM {{instance}}": "vllm:num_requests_waiting", "SGLang {{instance}}": "sglang:num_queue_reqs"}),
    Panel("Cache in use", {"vLLM {{instance}}": "vllm:kv_cache_usage_perc", "SGLang {{instance}}": "sglang:token_usage"}, "percentunit"),
    Panel("Tokens a second", {
        "vLLM {{instance}}": "sum by (instance) (rate(vllm:generation_tokens_total[1m]))",
        "SGLang {{instance}}": "sum by (instance) (sglang:gen_throughput)"}),
)  # fmt: skip
GPUS = (
    Panel("Utilization", {"GPU {{gpu}}": "rl_gpu_utilization_percent"}, "percent"),
    Panel("Memory", {"GPU {{gpu}}": "rl_gpu_memory_used_gigabytes", "GPU {{gpu}} has": "rl_gpu_memory_total_gigabytes"}, "decgbytes"),
    Panel("Temperature", {"GPU {{gpu}}": "rl_gpu_temperature_celsius"}, "celsius"),
    Panel("Power", {"GPU {{gpu}}": "rl_gpu_power_watts"}, "watt"),
)
DASHBOARDS: Mapping[str, tuple[str, Sequence[Panel]]] = {
    "training": ("Training", TRAINING),
    "servers": ("Rewards and answers", SERVERS),
    "gpus": ("GPUs", GPUS),
}


def made(name: str) -> str:
    """The JSON of a dashboard."""
    title, panels = DASHBOARDS[name]
    board = dashboard.Dashboard(f"lit-rl: {title}").uid(f"lit-rl-{name}").tags(["lit-rl"]).refresh("5s").time("now-1h", "now")
    board.with_variable(dashboard.DatasourceVariable("ds").label("Prometheus").type("prometheus"))
    for i, panel in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        place = GridPos(h=HEIGHT, w=WIDTH, x=column * WIDTH, y=row * HEIGHT)
        graph = timeseries.Panel().id(i + 1).title(panel.title).description(panel.about).datasource(SOURCE).unit(panel.unit).grid_pos(place)
        for letter, (legend, query) in zip("ABCD", panel.queries.items()):
            graph.with_target(prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend).datasource(SOURCE))
        board.with_panel(graph)
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(made(name), encoding="utf-8")


if __name__ == "__main__":
    main()
