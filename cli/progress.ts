/**
 * What happens during an apply, as it happens.
 *
 * @module
 */

import type { ApplyEvent, Operation } from "../planner/mod.ts";
import { shortTime, type Style } from "./style.ts";

/** Takes events of an apply. */
export interface Progress extends Disposable {
  /** Receives an event. */
  handle(event: ApplyEvent): void;
}

const DOING: Record<Operation["type"], string> = {
  create: "Creating",
  update: "Updating",
  delete: "Destroying",
  forget: "Forgetting",
  refresh: "Refreshing",
  depose: "Setting aside",
};
const DONE: Record<Operation["type"], string> = {
  create: "Created",
  update: "Updated",
  delete: "Destroyed",
  forget: "Forgotten",
  refresh: "Refreshed",
  depose: "Set aside",
};

interface Running {
  readonly operation: Operation["type"];
  readonly start: number;
  text: string;
}

/**
 * Plain lines: one at the start and one at the end of each operation, and progress every ten seconds.
 *
 * @param write Takes text
 * @param style Colours
 * @returns The progress
 */
export function plainProgress(write: (text: string) => void, style: Style): Progress {
  const running = new Map<string, Running & { said: number }>();
  return {
    handle(event) {
      if (event.type === "start") {
        const now = performance.now();
        running.set(event.address, { operation: event.operation, start: now, text: "", said: now });
        write(`${event.address}: ${DOING[event.operation]}...\n`);
      } else if (event.type === "progress") {
        const each = running.get(event.address);
        if (!each) return;
        const now = performance.now();
        const isNewStep = stepOf(event.text) !== stepOf(each.text);
        each.text = event.text;
        if (!isNewStep && now - each.said < 10_000) return;
        each.said = now;
        write(`${event.address}: ${event.text} [${shortTime(now - each.start)}]\n`);
      } else {
        running.delete(event.address);
        write(endLine(event, style));
      }
    },
    [Symbol.dispose]() {},
  };
}

/** A step's text without its figures, so that counting up is not a new step. */
function stepOf(text: string): string {
  return text.replaceAll(/[\d.]+/g, "#");
}

function endLine(event: Extract<ApplyEvent, { milliseconds: number }>, style: Style): string {
  const time = shortTime(event.milliseconds);
  return event.type === "complete"
    ? `${event.address}: ${style.green(DONE[event.operation])} after ${time}\n`
    : `${event.address}: ${style.red("Failed")} after ${time}: ${event.error.message.split("\n")[0]}\n`;
}

/**
 * A live view for a terminal: finished operations scroll up, running ones stay below with their time and step.
 *
 * @param write Takes text
 * @param style Colours
 * @param columns Tells the width of the terminal
 * @returns The progress
 */
export function liveProgress(write: (text: string) => void, style: Style, columns: () => number): Progress {
  const running = new Map<string, Running>();
  let drawn = 0;
  const erase = () => (drawn > 0 ? `\x1b[${drawn}A\x1b[J` : "");
  const draw = (above = "") => {
    const width = columns();
    const now = performance.now();
    const lines = [...running].slice(0, 20).map(([address, each]) => {
      const text = `${address}: ${DOING[each.operation]} ${shortTime(now - each.start)}${
        each.text === "" ? "" : `  ${each.text}`
      }`;
      return text.length >= width ? `${text.slice(0, Math.max(1, width - 2))}…` : text;
    });
    if (running.size > 20) lines.push(`and ${running.size - 20} more`);
    write(erase() + above + lines.map((line) => `${style.dim(line)}\n`).join(""));
    drawn = lines.length;
  };
  const timer = setInterval(() => running.size > 0 && draw(), 200);
  return {
    handle(event) {
      if (event.type === "start") {
        running.set(event.address, { operation: event.operation, start: performance.now(), text: "" });
        draw();
      } else if (event.type === "progress") {
        const each = running.get(event.address);
        if (each) each.text = event.text;
      } else {
        running.delete(event.address);
        draw(endLine(event, style));
      }
    },
    [Symbol.dispose]() {
      clearInterval(timer);
      write(erase());
      drawn = 0;
    },
  };
}
