/** Small parts of all pages. */

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { ApiError } from "../lib/api";
import { when } from "../lib/format";
import { prefs, t, told } from "../lib/prefs";
import type { Alert, Job, Problem } from "../lib/types";

export function StateChip({ job }: { job: Pick<Job, "state" | "stalled"> }) {
  return (
    <span class={`chip s-${job.state}`} data-state={job.state}>
      {told("state", job.state)}
      {job.stalled ? ` · ${t("stalled")}` : ""}
    </span>
  );
}

export function Bar({ value, label }: { value: number | null; label: string }) {
  const share = value === null || !Number.isFinite(value) ? 0 : Math.max(0, Math.min(1, value));
  return <progress class="bar" value={share} max={1} aria-label={label} title={label} />;
}

/** What went wrong, in the service's own words. */
export function Failure({ error }: { error: ApiError | null }) {
  if (!error) return null;
  return (
    <div class="banner bad" role="alert">
      <strong>{error.status === 0 ? t("unreachable") : error.message}</strong>
      <Problems list={error.details} />
    </div>
  );
}

export function Problems({ list }: { list: Problem[] }) {
  if (!list.length) return null;
  return (
    <ul class="problems">
      {list.map(({ field, problem }, i) => (
        <li key={i}>
          {field && <code>{field}</code>} {problem}
        </li>
      ))}
    </ul>
  );
}

/** What a rule has found, when, and when its reason was gone. */
export function AlertLine({ alert }: { alert: Alert }) {
  return (
    <>
      {alert.rule && <code>{alert.rule}</code>} {alert.message}{" "}
      <small class="dim">
        {alert.step != null ? t("step", { n: alert.step }) : ""} {when(alert.created_at ?? alert.ts, prefs.language)}
        {alert.ended_at ? ` · ${t("alert_ended", { time: when(alert.ended_at, prefs.language) })}` : ""}
      </small>
    </>
  );
}

export function Empty({ children }: { children: ComponentChildren }) {
  return <p class="empty dim">{children}</p>;
}

export function CopyButton({ text }: { text: string }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return (
    <button type="button" class="small" onClick={() => void copy()}>
      {done ? t("copied") : t("copy")}
    </button>
  );
}

/** A window over the page: Escape closes it, the focus comes back to where it was. */
export function Dialog({ title, close, children, wide }: { title: string; close: () => void; children: ComponentChildren; wide?: boolean }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current!.showModal(), []);
  return (
    <dialog ref={dialog} class={wide ? "wide" : ""} aria-label={title} onClose={close} onClick={(event) => event.target === dialog.current && close()}>
      <header>
        <h2>{title}</h2>
        <button type="button" class="small" aria-label={t("close")} onClick={close}>
          ✕
        </button>
      </header>
      {children}
    </dialog>
  );
}

/** A button that runs something of the service, once at a time, and shows what it answered if it refused. */
export function Action({ run, children, kind, confirm: question }: { run: () => Promise<unknown>; children: ComponentChildren; kind?: string; confirm?: string }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<ApiError | null>(null);
  const click = async () => {
    if (question && !window.confirm(question)) return;
    setBusy(true);
    setError(null);
    try {
      await run();
    } catch (failure) {
      setError(failure as ApiError);
    } finally {
      setBusy(false);
    }
  };
  return (
    <>
      <button type="button" class={kind} disabled={busy} onClick={() => void click()}>
        {children}
      </button>
      {error && (
        <Dialog title={t("refused")} close={() => setError(null)}>
          <Failure error={error} />
        </Dialog>
      )}
    </>
  );
}
