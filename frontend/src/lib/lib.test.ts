import { describe, expect, it } from "vitest";
import { bytes, duration, number } from "./format";
import { wait } from "./live";
import { hasPanel, outside, phases, sources } from "./names";
import { body, fields, optionFields, typed } from "./schema";
import { align, cumulate, distinct, empty, last, put, smooth } from "./series";

describe("curves", () => {
  it("puts a point where its step belongs, and replaces the same step", () => {
    const series = empty();
    for (const [step, value] of [[1, 0.1], [3, 0.3], [2, 0.2], [3, 0.4], [4, null]] as const) put(series, step, value);
    expect(series.step).toEqual([1, 2, 3, 4]);
    expect(series.mean).toEqual([0.1, 0.2, 0.4, null]);
    expect(last(series)).toBe(0.4);
  });
  it("aligns on the union of steps", () => {
    expect(align([{ step: [1, 2], values: [5, 6] }, { step: [2, 3], values: [7, 8] }])).toEqual([[1, 2, 3], [5, 6, null], [null, 7, 8]]);
  });
  it("smooths without the bias of the start", () => {
    expect(smooth([1, 1, null, 1], 0.9)).toEqual([1, 1, null, 1]);
    expect(smooth([0, 1], 0.5)[1]).toBeCloseTo(2 / 3);
  });
  it("leaves out curves that say the same as an earlier one", () => {
    const curve = (...mean: number[]) => ({ ...empty(), step: mean.map((_, i) => i), mean });
    const curves = { a: curve(1, 2), "a/only_set": curve(1, 2), b: curve(1, 3), c: curve(1) };
    expect(distinct(Object.entries(curves), ([, series]) => [series]).map(([name]) => name)).toEqual(["a", "b", "c"]);
  });
  it("stacks", () => expect(cumulate([[1, 2], [3, null]])).toEqual([[1, 2], [4, 2]]));
});

describe("names", () => {
  it("finds the sources of reward with what failed and who disagrees", () => {
    const names = ["reward_mean", "reward/judge", "reward/judge/failed_fraction", "reward/ocr/mean", "reward/ocr/std", "reward/judge/disagrees_with/ocr", "reward/wait_seconds"];
    expect(sources(names)).toEqual([
      { name: "judge", mean: "reward/judge", failed: "reward/judge/failed_fraction", disagrees: ["reward/judge/disagrees_with/ocr"] },
      { name: "ocr", mean: "reward/ocr/mean", failed: null, disagrees: ["reward/judge/disagrees_with/ocr"] },
    ]);
  });
  it("orders phases as they run", () => {
    expect(phases(["time/other_s", "time/train_s", "time/score_s", "time/rollout_s", "time/made_up_s"]).map(([phase]) => phase)).toEqual(["rollout", "score", "train", "made_up", "other"]);
  });
  it("knows what the overview has no panel for", () => {
    expect(["loss", "time/train_s", "reward/judge", "group/zero_std_ratio", "accuracy", "val/loss"].map(hasPanel)).toEqual([true, true, true, true, false, false]);
  });
  it("knows the guide's ranges", () => {
    expect([outside("kl_divergence", 0.2), outside("clip_fraction", 0.05), outside("clip_fraction", 0.2), outside("clip_fraction", 0), outside("entropy", 9)]).toEqual(["high", "low", null, null, null]);
  });
});

describe("the form", () => {
  const schema = {
    $ref: "#/$defs/Job",
    $defs: {
      Job: {
        required: ["name"],
        properties: {
          name: { type: "string" },
          lr: { anyOf: [{ type: "number", exclusiveMinimum: 0 }, { type: "null" }], default: null },
          method: { $ref: "#/$defs/Method" },
          tags: { type: "array", items: { type: "string" } },
        },
      },
      Method: { enum: ["grpo", "ppo"], type: "string" },
    },
  };
  it("is what the schema asks for", () => {
    const list = fields(schema);
    expect(list.map(({ name, kind, required }) => [name, kind, required])).toEqual([["name", "text", true], ["lr", "number", false], ["method", "choice", false], ["tags", "list", false]]);
    expect(body(list, { name: "a", lr: "1e-6", method: "", tags: "x, y" })).toEqual({ name: "a", lr: 1e-6, tags: ["x", "y"] });
  });
  it("takes the options of a method for fields, and what the run file says for their defaults", () => {
    const option = { name: "x", required: false, value: null, help: "" };
    const options = [
      { ...option, key: "a", type: "int", default: "1", value: 8 },
      { ...option, key: "b", type: "float | None", default: "1e-05" },
      { ...option, key: "c", type: "Literal['k1', 'k3']", default: "'k3'" },
      { ...option, key: "d", type: "Surrogate | None", default: "None" },
    ];
    expect(optionFields(options).map(({ name, kind, initial, choices }) => [name, kind, initial, choices])).toEqual([
      ["a", "integer", 8, []],
      ["b", "number", 1e-5, []],
      ["c", "choice", "k3", ["k1", "k3"]],
    ]);
  });
  it("reads values of settings as JSON, else as text", () => expect(["8", "true", "lit_rl.methods.grpo.GRPO", "[1]"].map(typed)).toEqual([8, true, "lit_rl.methods.grpo.GRPO", [1]]));
});

it("waits longer with each try, at most 10 s, never less than half of it", () => {
  expect([0, 1, 2, 20].map((n) => wait(n, 1))).toEqual([500, 1000, 2000, 10_000]);
  expect(wait(20, 0)).toBe(5000);
});

it("writes numbers shortly", () => {
  expect([number(0.123456), number(null), number(1e-6), number(12), bytes(1536), duration(3700)]).toEqual(["0.1235", "–", "1.00e-6", "12", "1.5 KiB", "1 h 1 min"]);
});
