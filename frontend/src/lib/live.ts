/** A WebSocket that comes back: waits 0.5 s, doubled up to 10 s with jitter, and asks for what it missed. */

import { socketUrl } from "./api";
import type { Frame } from "./types";

export type Connection = "connecting" | "open" | "waiting";

const FIRST = 500;
const LONGEST = 10_000;

/** Milliseconds before try number n (from 0); random in [0, 1) spreads many pages over half of the time. */
export function wait(n: number, random: number): number {
  return Math.min(LONGEST, FIRST * 2 ** n) * (0.5 + random / 2);
}

export interface Handlers {
  frame(frame: Frame): void;
  /** Everything must be read, from now on events follow: at the first connection, and where some were lost. */
  resync(): void;
  connection(state: Connection): void;
}

export class Live {
  private socket: WebSocket | null = null;
  private timer = 0;
  private tries = 0;
  private seq: number | null = null;
  private epoch: string | null = null;
  private closed = false;

  constructor(
    private readonly path: string,
    private readonly handlers: Handlers,
    private readonly topics: string[] = [],
  ) {
    this.open();
  }

  close(): void {
    this.closed = true;
    clearTimeout(this.timer);
    this.socket?.close(1000);
  }

  private open(): void {
    this.handlers.connection("connecting");
    const socket = new WebSocket(socketUrl(this.path, { since: this.seq }));
    this.socket = socket;
    socket.onopen = () => {
      if (this.topics.length) socket.send(JSON.stringify({ type: "subscribe", topics: this.topics }));
      this.handlers.connection("open");
    };
    socket.onmessage = (event) => this.take(JSON.parse(String(event.data)) as Frame);
    socket.onclose = () => this.again();
  }

  /** Numbers of events are those of one life of the server: after a restart they begin anew, and what came between is lost. */
  private take(frame: Frame): void {
    this.tries = 0;
    if (frame.type === "hello") {
      if (frame.epoch !== this.epoch) this.handlers.resync();
      this.epoch = frame.epoch ?? null;
    }
    if (frame.type === "resync") this.handlers.resync();
    if (typeof frame.seq === "number") this.seq = frame.seq;
    this.handlers.frame(frame);
  }

  private again(): void {
    if (this.closed) return;
    this.handlers.connection("waiting");
    this.timer = window.setTimeout(() => this.open(), wait(this.tries++, Math.random()));
  }
}
