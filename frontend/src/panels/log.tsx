/** The tail of a job's log: follows, searches, and reads back to the beginning. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { ApiError, get } from "../lib/api";
import { t } from "../lib/prefs";
import type { Feed } from "../lib/feed";
import { Failure } from "../parts/common";

interface Piece {
  text: string;
  next_offset: number;
  size: number;
  eof: boolean;
}

const READ = 65_536;
const KEPT = 400_000;

export function Log({ feed }: { feed: Feed }) {
  const [text, setText] = useState("");
  const [from, setFrom] = useState(0);
  const [follow, setFollow] = useState(true);
  const [search, setSearch] = useState("");
  const [error, setError] = useState<ApiError | null>(null);
  const box = useRef<HTMLPreElement>(null);
  const read = (offset: number, limit = READ) => get<Piece>(`api/jobs/${encodeURIComponent(feed.id)}/logs`, { stream: "stdout", offset, limit });

  useEffect(() => {
    let left = false;
    let next = 0;
    let busy = false;
    let again = false;
    const tail = async (start: number) => {
      try {
        let piece = await read(start);
        if (start === 0 && piece.size > READ) {
          start = piece.size - READ;
          piece = await read(start);
          setFrom(start);
        }
        for (;;) {
          if (left) return;
          const added = piece.text;
          setText((old) => (old + added).slice(-KEPT));
          if (piece.next_offset <= next) break;
          next = piece.next_offset;
          if (piece.eof || next >= piece.size) break;
          piece = await read(next);
        }
      } catch (failure) {
        if (!left) setError(failure as ApiError);
      }
    };
    const more = async () => {
      again = true;
      if (busy) return;
      for (busy = true; again && !left; ) {
        again = false;
        await tail(next);
      }
      busy = false;
    };
    void more();
    const leave = feed.onLog(() => void more());
    return () => {
      left = true;
      leave();
    };
  }, [feed]);

  useLayoutEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [text, follow, search]);

  const earlier = async () => {
    const start = Math.max(0, from - READ);
    const piece = await read(start, from - start);
    setFollow(false);
    setText((old) => piece.text + old);
    setFrom(start);
  };
  const words = search.toLowerCase();
  const shown = words ? text.split("\n").filter((line) => line.toLowerCase().includes(words)).join("\n") : text;
  return (
    <section aria-label={t("tab.log")}>
      <Failure error={error} />
      <div class="row controls">
        <label>
          {t("search")}
          <input type="search" value={search} onInput={(event) => setSearch(event.currentTarget.value)} />
        </label>
        <label class="check">
          <input type="checkbox" checked={follow} onChange={(event) => setFollow(event.currentTarget.checked)} />
          {t("follow")}
        </label>
        {from > 0 && (
          <button type="button" class="small" onClick={() => void earlier()}>
            {t("earlier")}
          </button>
        )}
      </div>
      <pre class="log card" ref={box} tabIndex={0} aria-label={t("tab.log")} data-log>
        {shown || t("no_log")}
      </pre>
    </section>
  );
}
