/**
 * What devices do with the parts of buffers.
 *
 * @module
 */

import type { DeviceContext } from "./virtio_device.ts";
import { type DescriptorChain, type Segment, totalLength, type Virtqueue } from "./virtqueue.ts";

/**
 * Takes buffers from a queue, at most as many as it holds, and gives them back used.
 *
 * @param context Interrupts the guest afterwards
 * @param queue The queue
 * @param step Uses a buffer and returns how many bytes it wrote, or undefined to leave the buffer for later
 * @returns Whether it came to the end; otherwise there may be more
 */
export function drainQueue(
  context: DeviceContext,
  queue: Virtqueue,
  step: (chain: DescriptorChain) => number | undefined,
): boolean {
  let count = 0;
  while (count < queue.size) {
    const chain = queue.pop();
    if (!chain) {
      queue.setNotification(true);
      if (queue.hasPending) continue;
      break;
    }
    const written = step(chain);
    if (written === undefined) {
      queue.unpop();
      break;
    }
    queue.push(chain.head, written);
    count++;
  }
  if (count > 0) context.interrupt(queue);
  return count < queue.size;
}

/**
 * Picks a range of a buffer.
 *
 * @param segments Parts of the buffer
 * @param skip Where the range begins
 * @param limit How long it is at most
 * @returns Its parts, none of them empty
 */
export function sliceSegments(segments: readonly Segment[], skip: number, limit = Infinity): Segment[] {
  const range: Segment[] = [];
  for (const { offset, length } of segments) {
    const taken = Math.min(length - skip, limit);
    if (taken > 0) {
      range.push({ offset: offset + skip, length: taken });
      limit -= taken;
    }
    skip = Math.max(0, skip - length);
  }
  return range;
}

/**
 * Copies what the guest wrote, so that it can be checked.
 *
 * @param memory Memory of the guest
 * @param segments What to copy
 * @returns The copy
 */
export function copySegments(memory: Uint8Array, segments: readonly Segment[]): DataView<ArrayBuffer> {
  const bytes = new Uint8Array(totalLength(segments));
  let at = 0;
  for (const { offset, length } of segments) {
    bytes.set(memory.subarray(offset, offset + length), at);
    at += length;
  }
  return new DataView(bytes.buffer);
}

/**
 * Writes to the beginning of a buffer.
 *
 * @param memory Memory of the guest
 * @param segments The buffer, which has room
 * @param bytes What to write
 */
export function fillSegments(memory: Uint8Array, segments: readonly Segment[], bytes: Uint8Array): void {
  let at = 0;
  for (const { offset, length } of sliceSegments(segments, 0, bytes.length)) {
    memory.set(bytes.subarray(at, at + length), offset);
    at += length;
  }
}
