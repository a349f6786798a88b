import assert from "node:assert/strict";
import { playHostileGuest, type Report } from "./hostile_guest.ts";

const CASES = 1_000_000;
// Odd seeds have little memory, even ones have memory on both sides of the hole. The last is new each time.
const SEEDS = [1, 2, 3, 2 ** 31 + crypto.getRandomValues(new Uint32Array(1))[0]! % 2 ** 31];

Deno.test(`${CASES.toLocaleString("en")} cases of a hostile guest (the last seed is ${SEEDS.at(-1)})`, async () => {
  const ends = await Promise.allSettled(
    SEEDS.map((seed) => playHostileGuest({ seed, cases: CASES / SEEDS.length })),
  );
  const reports: Report[] = [];
  for (const end of ends) {
    if (end.status === "rejected") throw end.reason;
    reports.push(end.value);
  }
  const sum = (count: (report: Report) => number) =>
    reports.reduce((total, report) => total + count(report), 0);
  assert.ok(sum(({ cases }) => cases) >= CASES);
  // It was worth something: devices worked, and gave up, and each had its share.
  assert.ok(sum(({ counts }) => counts.taken) > CASES / 4);
  assert.ok(sum(({ counts }) => counts.returned) > CASES / 4);
  for (const { devices } of reports) {
    for (const [name, { ring, register, failed, up }] of Object.entries(devices)) {
      assert.ok(
        ring > 1000 && register > 1000 && failed > 10 && up > 10,
        `"${name}" was hardly played with`,
      );
    }
  }
});
