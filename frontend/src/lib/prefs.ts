/** Language and colours of this browser, kept in its local storage. */

import { useEffect, useState } from "preact/hooks";
import en from "../text/en.json";
import zh from "../text/zh-CN.json";

export type Word = keyof typeof en;
export type Language = "en" | "zh-CN";
export type Theme = "auto" | "light" | "dark";

const TEXTS: Record<Language, Record<Word, string>> = { en, "zh-CN": zh };
const listeners = new Set<() => void>();
const dark = matchMedia("(prefers-color-scheme: dark)");

function stored(key: string): string | null {
  try {
    return localStorage.getItem(key);
  } catch {
    return null; // storage is forbidden in this browser: choices last as long as the page
  }
}

function keep(key: string, value: string): void {
  try {
    localStorage.setItem(key, value);
  } catch {
    return; // as above
  }
}

const wanted = stored("language") ?? navigator.language;
export const prefs: { language: Language; theme: Theme } = {
  language: wanted.startsWith("zh") ? "zh-CN" : "en",
  theme: (["light", "dark"] as const).find((theme) => theme === stored("theme")) ?? "auto",
};

function apply(): void {
  document.documentElement.lang = prefs.language;
  document.documentElement.dataset.theme = prefs.theme === "auto" ? (dark.matches ? "dark" : "light") : prefs.theme;
  for (const listener of listeners) listener();
}

export function setLanguage(language: Language): void {
  prefs.language = language;
  keep("language", language);
  apply();
}

export function setTheme(theme: Theme): void {
  prefs.theme = theme;
  keep("theme", theme);
  apply();
}

dark.addEventListener("change", apply);
apply();

/** Render again when language or colours change; the number of the change is the key of what was drawn with them. */
export function usePrefs(): number {
  const [count, setCount] = useState(0);
  useEffect(() => {
    const listener = () => setCount((n) => n + 1);
    listeners.add(listener);
    return () => void listeners.delete(listener);
  }, []);
  return count;
}

/** A text of the page in the chosen language; {name} is replaced by the value of that name. */
export function t(word: Word, values: Record<string, string | number> = {}): string {
  return TEXTS[prefs.language][word].replace(/\{(\w+)\}/g, (_, name: string) => String(values[name] ?? ""));
}

/** The text for a word that comes from the service, e.g. a state; the word itself where there is none. */
export function told(prefix: string, word: string): string {
  const key = `${prefix}.${word}`;
  return key in TEXTS.en ? t(key as Word) : word;
}
