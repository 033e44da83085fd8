/** Reading for components: the answer, the error, and a way to read again. */

import { useCallback, useEffect, useState } from "preact/hooks";
import { ApiError } from "./api";

export interface Loaded<T> {
  data: T | null;
  error: ApiError | null;
  again: () => void;
}

/** Read when the component appears, when `key` changes and, if `every` is given, that many milliseconds after each answer. */
export function useLoad<T>(key: string, read: (signal: AbortSignal) => Promise<T>, every?: number): Loaded<T> {
  const [state, setState] = useState<{ data: T | null; error: ApiError | null }>({ data: null, error: null });
  const [count, setCount] = useState(0);
  useEffect(() => {
    const left = new AbortController();
    let timer = 0;
    const go = async (): Promise<void> => {
      try {
        const data = await read(left.signal);
        if (!left.signal.aborted) setState({ data, error: null });
      } catch (error) {
        if (error instanceof ApiError) setState((old) => ({ ...old, error }));
        else if (!left.signal.aborted) throw error;
      }
      if (every && !left.signal.aborted) timer = window.setTimeout(() => void go(), every);
    };
    void go();
    return () => {
      left.abort();
      clearTimeout(timer);
    };
  }, [key, count]);
  const again = useCallback(() => setCount((n) => n + 1), []);
  return { ...state, again };
}
