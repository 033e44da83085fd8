/** The frame of all pages: navigation, language, colours, and which page an address means. */

import { useEffect, useState } from "preact/hooks";
import icon from "./icon.svg";
import { onRefused } from "./lib/api";
import { prefs, setLanguage, setTheme, t, usePrefs, type Theme, type Word } from "./lib/prefs";
import { useRoute, type Route } from "./lib/router";
import { AlertsPage } from "./pages/alerts";
import { Compare } from "./pages/compare";
import { JobPage } from "./pages/job";
import { Jobs } from "./pages/jobs";
import { MachinePage } from "./pages/machine";
import { Models } from "./pages/models";
import { NewJob } from "./pages/new";
import { TokenPage } from "./pages/token";
import { Empty } from "./parts/common";

const PLACES: [string, Word][] = [
  ["jobs", "jobs"],
  ["alerts", "alerts"],
  ["machine", "machine"],
  ["models", "models"],
];
const THEMES: Theme[] = ["auto", "light", "dark"];

function Page({ route }: { route: Route }) {
  const [place = "jobs", id, tab = ""] = route.parts;
  if (place === "jobs" && id) return <JobPage key={id} id={id} tab={tab} />;
  if (place === "jobs") return <Jobs />;
  if (place === "new") return <NewJob from={route.query.get("from")} />;
  if (place === "compare") return <Compare ids={(route.query.get("jobs") ?? "").split(",").filter(Boolean)} />;
  if (place === "alerts") return <AlertsPage />;
  if (place === "machine") return <MachinePage />;
  if (place === "models") return <Models />;
  return <Empty>{t("no_page")}</Empty>;
}

export function App() {
  usePrefs();
  const route = useRoute();
  const [locked, setLocked] = useState(false);
  useEffect(() => onRefused(() => setLocked(true)), []);
  const place = route.parts[0] ?? "jobs";
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), document.getElementById("main")!.focus())}>
        {t("skip")}
      </a>
      <nav class="top" aria-label={t("pages")}>
        <a class="brand" href="#/" aria-label="lit-rl">
          <img src={icon} alt="" width={22} height={22} /> <span>lit-rl</span>
        </a>
        {PLACES.map(([name, word]) => (
          <a key={name} href={`#/${name}`} aria-current={place === name ? "page" : undefined}>
            {t(word)}
          </a>
        ))}
        <span class="space" />
        <button type="button" class="small" lang={prefs.language === "en" ? "zh-CN" : "en"} onClick={() => setLanguage(prefs.language === "en" ? "zh-CN" : "en")} data-language>
          {prefs.language === "en" ? "中文" : "English"}
        </button>
        <select class="small" aria-label={t("colours")} value={prefs.theme} onChange={(event) => setTheme(event.currentTarget.value as Theme)} data-theme-select>
          {THEMES.map((theme) => (
            <option key={theme} value={theme}>
              {t(`theme.${theme}` as Word)}
            </option>
          ))}
        </select>
      </nav>
      <main id="main" tabIndex={-1}>
        {locked ? <TokenPage entered={() => setLocked(false)} /> : <Page route={route} />}
      </main>
    </>
  );
}
