/** A task of the service, e.g. a merge: its state and progress until it is over. */

import { get } from "../lib/api";
import { plain } from "../lib/format";
import { useLoad } from "../lib/load";
import { t, told } from "../lib/prefs";
import type { Task } from "../lib/types";
import { Bar, Failure } from "./common";

const OVER = new Set(["succeeded", "failed", "done"]);

export function TaskCard({ id, over }: { id: string; over: () => void }) {
  const { data, error } = useLoad<Task>(
    id,
    async (signal) => {
      const task = await get<Task>(`api/tasks/${encodeURIComponent(id)}`, {}, signal);
      if (OVER.has(task.state)) over();
      return task;
    },
    1000,
  );
  if (!data) return <Failure error={error} />;
  return (
    <div class="card" role="status" data-task={data.state}>
      <p>
        <strong>{data.kind}</strong> {told("state", data.state)} {plain(data.message ?? data.output ?? "")}
      </p>
      <Bar value={OVER.has(data.state) ? 1 : data.progress} label={t("progress")} />
    </div>
  );
}
