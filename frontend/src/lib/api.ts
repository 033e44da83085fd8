/** Calls of the service: JSON in and out, one error class, relative to where the page lies. */

import type { Problem } from "./types";

export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly details: Problem[] = [],
  ) {
    super(message);
  }
}

type Query = Record<string, string | number | boolean | null | undefined>;

let refused: () => void = () => {};

/** Name the function that is called when the service wants a token. */
export function onRefused(handler: () => void): void {
  refused = handler;
}

export function url(path: string, query: Query = {}): string {
  const address = new URL(path, document.baseURI);
  for (const [key, value] of Object.entries(query)) if (value !== null && value !== undefined && value !== "") address.searchParams.set(key, String(value));
  return address.href;
}

/** The address of a WebSocket beside the page. */
export function socketUrl(path: string, query: Query = {}): string {
  return url(path, query).replace(/^http/, "ws");
}

/** An address that an answer names, only if it is the service's own; nothing else is shown or followed. */
export function ownAddress(address: string | null | undefined): string | null {
  if (!address) return null;
  const parsed = new URL(address.replace(/^\/(?=api\/)/, ""), document.baseURI);
  return parsed.origin === location.origin ? parsed.href : null;
}

export async function call<T>(method: string, path: string, options: { query?: Query; body?: unknown; signal?: AbortSignal } = {}): Promise<T> {
  let response: Response;
  try {
    response = await fetch(url(path, options.query), {
      method,
      credentials: "same-origin",
      signal: options.signal,
      headers: options.body === undefined ? {} : { "Content-Type": "application/json" },
      body: options.body === undefined ? undefined : JSON.stringify(options.body),
    });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", error instanceof Error ? error.message : String(error));
  }
  if (response.status === 401) refused();
  if (response.status === 204) return undefined as T;
  const answer: unknown = await response.json().catch(() => null);
  if (!response.ok) {
    const error = (answer as { error?: { code?: string; message?: string; details?: Problem[] } } | null)?.error;
    throw new ApiError(response.status, error?.code ?? "http_error", error?.message ?? response.statusText, error?.details ?? []);
  }
  return answer as T;
}

export const get = <T>(path: string, query?: Query, signal?: AbortSignal) => call<T>("GET", path, { query, signal });
export const post = <T>(path: string, body: unknown = {}) => call<T>("POST", path, { body });
