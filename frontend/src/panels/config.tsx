/** What runs: the command line and the YAML of a job. */

import { get } from "../lib/api";
import type { Feed } from "../lib/feed";
import { plain } from "../lib/format";
import { useLoad } from "../lib/load";
import { t } from "../lib/prefs";
import { CopyButton, Failure } from "../parts/common";

interface ConfigAnswer {
  argv: string[];
  config: unknown;
  yaml: string;
}

export function Config({ feed }: { feed: Feed }) {
  const { data, error } = useLoad<ConfigAnswer>(feed.id, (signal) => get(`api/jobs/${encodeURIComponent(feed.id)}/config`, {}, signal));
  const command = data?.argv?.map(quoted).join(" ") ?? "";
  return (
    <section aria-label={t("tab.config")}>
      <Failure error={error} />
      {data && command && (
        <>
          <h2>
            {t("command")} <CopyButton text={command} />
          </h2>
          <pre class="card text">{command}</pre>
          <h2>
            YAML <CopyButton text={data.yaml ?? ""} />
          </h2>
          <pre class="card text">{data.yaml || plain(data.config)}</pre>
        </>
      )}
    </section>
  );
}

/** A word of a command line as a shell reads it. */
function quoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}
