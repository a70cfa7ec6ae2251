// A port of the specification to JavaScript, which runs the golden vectors of the core steps, and of one merge.
//
// It shares no code with the library. Like its neighbor in Python it has no dtypes: every number is a double, one row
// at a time. The first half is the method, the second reads the vectors, calls the first for each row, and compares.
//
//     node docs/examples/plain_port.mjs [file.json ...]

import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const CORE = ["order", "build_graph", "propagate", "degree", "fuse", "pagerank", "select", "sum_rows", "figure", "counts"];
// Of the policies that merge the port has one, Absorb over StreamingLLM.
const FILES = [...CORE, "merging"];
const isOurs = (one) => one.step !== "evict" || one.arguments.policy.name === "Absorb";
const SMALLEST_FACTOR = 1e-6;
const SMALLEST_POWER = 1e-24;
const LARGEST_POWER = 1e24;

// The method, for one row.

const range = (count) => Array.from({ length: count }, (_, index) => index);
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const dot = (a, b) => sum(a.map((x, index) => x * b[index]));
const clip = (x, low, high) => Math.min(high, Math.max(low, x));

// Token indices, best first: lower tier, numbers before NaN, higher score, lower index.
function order(scores, tiers = null) {
  const places = scores.map((score, j) => {
    const isNaN = Number.isNaN(score);
    return [tiers ? tiers[j] : 0, isNaN ? 1 : 0, isNaN ? 0 : -score, j];
  });
  const compare = (a, b) => {
    for (const key of range(4)) {
      if (places[a][key] < places[b][key]) return -1;
      if (places[a][key] > places[b][key]) return 1;
    }
    return 0;
  };
  return range(scores.length).sort(compare);
}

// The key at length one, or null if its length, as the arithmetic has it, is zero, infinite or NaN.
function direction(key, narrow) {
  const square = sum(key.map((x) => x * x));
  const inRange = narrow ? Math.fround(square) : square;
  return inRange > 0 && Number.isFinite(inRange) ? key.map((x) => x / Math.sqrt(square)) : null;
}

// Step 1: the sources, ascending, and for each of them its neighbors and their weights, by descending weight.
function buildGraph(keys, importance, numSources, numNeighbors, valid, narrow) {
  const isValid = valid ?? importance.map(() => true);
  const sources = order(importance, isValid.map((ok) => (ok ? 0 : 1))).slice(0, numSources).sort((a, b) => a - b);
  const eligible = range(importance.length).filter((j) => isValid[j] && !sources.includes(j));
  const directions = keys.map((key) => direction(key, narrow));
  const edges = sources.map((source) => {
    if (!isValid[source]) return [];
    const of = directions[source];
    const weights = eligible.map((j) => (of && directions[j] ? clip(dot(of, directions[j]), 0, 1) : 0));
    return order(weights).slice(0, numNeighbors).map((place) => [eligible[place], weights[place]]);
  });
  return { sources, edges };
}

// Step 2: the scores after the sources have sent their signal to their neighbors.
function propagate(importance, neighbors, weights, { signal, rounds, accumulation, strength }) {
  if (accumulation === "sum" && rounds !== 1) throw new RangeError("a sum is defined for one round only");
  const reaching = importance.map(() => []);
  neighbors.forEach((row, source) =>
    row.forEach((j, place) => {
      const weight = weights[source][place];
      if (weight > 0) reaching[j].push(Math.min(1, weight)); // not so for NaN
    }),
  );
  const sign = signal === "enhance" ? 1 : -1;
  return importance.map((score, j) => {
    if (reaching[j].length === 0 || rounds === 0 || strength === 0) return score;
    if (signal === "evict") return -Infinity;
    if (score === 0 || !Number.isFinite(score)) return score;
    const steps = reaching[j].map((weight) => 1 + sign * strength * weight);
    const factor =
      accumulation === "sum"
        ? 1 + sign * strength * sum(reaching[j])
        : steps.reduce((product, step) => product * Math.max(SMALLEST_FACTOR, step), 1);
    const power = factor ** rounds;
    return score > 0 ? score * power : score - Math.abs(score) * (1 - power);
  });
}

// The mean cosine of each key with all keys, by way of the mean direction.
function degree(keys, valid, narrow) {
  const isValid = valid ?? keys.map(() => true);
  const directions = keys.map((key, j) => (isValid[j] ? direction(key, narrow) : null));
  const usable = directions.filter((one) => one !== null);
  const count = isValid.filter(Boolean).length;
  const mean = usable.length ? usable[0].map((_, d) => sum(usable.map((one) => one[d])) / count) : [];
  return directions.map((one) => (one ? clip(dot(one, mean), -1, 1) : 0));
}

// The rank of each value, 1 for the worst.
function ranks(values) {
  const found = values.map(() => 0);
  order(values).forEach((j, place) => (found[j] = values.length - place));
  return found;
}

// The scores from the importance and from the distance to the other tokens.
function fuse(importance, degrees, fusion, exponent, valid) {
  const tokens = range(importance.length).filter((j) => !valid || valid[j]);
  const distances = degrees.map((c) => 1 - (Number.isNaN(c) ? 0 : clip(c, -1, 1)));
  const lowest = Math.min(0, ...tokens.map((j) => importance[j]).filter(Number.isFinite));
  const byImportance = ranks(tokens.map((j) => importance[j]));
  const byDistance = ranks(tokens.map((j) => distances[j]));
  const scores = [...importance];
  tokens.forEach((j, place) => {
    if (fusion === "power") {
      scores[j] = (importance[j] - lowest) * clip(distances[j] ** exponent, SMALLEST_POWER, LARGEST_POWER);
    } else {
      const [first, second] = [byImportance[place], byDistance[place]];
      scores[j] = fusion === "max_rank" ? Math.max(first, second) : (first + second) / 2;
    }
  });
  return scores;
}

// The scores after importance has flowed between like tokens, by way of one sum of directions a round.
function pagerank(importance, keys, damping, rounds, valid, narrow) {
  if (damping === 0 || rounds === 0) return importance;
  const tokens = range(keys.length).filter((j) => (!valid || valid[j]) && Number.isFinite(importance[j]));
  const directions = tokens.map((j) => direction(keys[j], narrow) ?? keys[j].map(() => 0));
  const lowest = Math.min(0, ...tokens.map((j) => importance[j]));
  const size = sum(tokens.map((j) => importance[j] - lowest));
  const home = tokens.map((j) => (size ? (importance[j] - lowest) / size : 1 / tokens.length));
  let central = home;
  for (const _ of range(tokens.length ? rounds : 0)) {
    const anchor = directions[0].map((_, d) => sum(directions.map((one, place) => central[place] * one[d])));
    const near = directions.map((one) => sum(central) + dot(one, anchor));
    central = near.map((arriving, place) => (damping * arriving) / sum(near) + (1 - damping) * home[place]);
  }
  const scores = [...importance];
  tokens.forEach((j, place) => (scores[j] = central[place] * (size || 1)));
  return scores;
}

// Step 3: the tokens that are kept, ascending.
function select(scores, budget, isProtected, valid) {
  const tiers = scores.map((_, j) => (valid && !valid[j] ? 2 : isProtected && isProtected[j] ? 0 : 1));
  return order(scores, tiers).slice(0, budget).sort((a, b) => a - b);
}

// The sum of the rows of `size` numbers that go into each slot; -1 goes nowhere.
function sumRows(table, into, numSlots, size) {
  const members = range(numSlots).map((slot) => table.filter((_, j) => into[j] === slot));
  return members.map((member) => range(size).map((d) => member.reduce((sum, row) => sum + row[d], 0)));
}

// The mean attention that each token receives from those of the last queries that can see it, over all query heads.
function meanReceived(keys, heads, window, valid) {
  const found = keys.map(() => []);
  for (const queries of heads) {
    queries.slice(-window).forEach((query, place, last) => {
      const position = keys.length - last.length + place;
      const seen = range(position + 1).filter((j) => valid[position] && valid[j]);
      const powers = seen.map((j) => Math.exp(dot(query, keys[j]) / Math.sqrt(query.length)));
      seen.forEach((j, rank) => found[j].push(powers[rank] / sum(powers)));
    });
  }
  return found.map((row) => (row.length ? sum(row) / row.length : 0));
}

// A merge: each dropped token goes into the kept, unprotected one with the most similar key, or nowhere. A slot's key
// stays, its value becomes an average, and attention counts it as many times as its weights hold its own.
function absorb(keys, values, weights, kept, isProtected, valid, threshold) {
  const directions = keys.map((key) => direction(key, true));
  const targets = kept.filter((k) => valid[k] && !isProtected[k]);
  const members = new Map(kept.map((k) => [k, [k]]));
  for (const j of range(keys.length).filter((j) => valid[j] && !members.has(j))) {
    const cosines = targets.map((k) => (directions[j] && directions[k] ? dot(directions[j], directions[k]) : 0));
    const [best] = order(cosines);
    if (cosines[best] >= threshold) members.get(targets[best]).push(j);
  }
  return kept.map((k) => {
    const weight = (j) => (weights[k] > 0 ? weights[j] : 1);
    const total = sum(members.get(k).map(weight));
    const parts = values[k].map((_, d) => sum(members.get(k).map((j) => weight(j) * values[j][d])));
    return { key: keys[k], value: parts.map((part) => part / total), logMass: Math.log(total / weight(k)) };
  });
}

// A decimal number as it was written, as a fraction of two BigInts: shares are exact.
function asWritten(number) {
  const [mantissa, exponent] = String(number).split("e");
  const [whole, decimals = ""] = mantissa.split(".");
  const power = Number(exponent ?? 0) - decimals.length;
  const digits = BigInt(whole + decimals);
  return power >= 0 ? [digits * 10n ** BigInt(power), 1n] : [digits, 10n ** BigInt(-power)];
}

// A budget in tokens: an integer as it is, a share rounded, halves up.
function budgetTokens(budget, numTokens) {
  if (!(budget instanceof Share)) return budget;
  const [numerator, denominator] = asWritten(budget.value);
  return Number((2n * numerator * BigInt(numTokens) + denominator) / (2n * denominator));
}

// A count: an integer as it is, a share rounded down, but at least 1 of what is not nothing.
function ratioCount(amount, total) {
  if (!(amount instanceof Share)) return amount;
  const [numerator, denominator] = asWritten(amount.value);
  if (numerator === 0n || total === 0) return 0;
  return Math.max(1, Number((numerator * BigInt(total)) / denominator));
}

// The vectors.

// JavaScript has one kind of number, so what the file writes with a point, 1.0, must be told from what it writes
// without, 1: one is a share of all, the other a count of one.
class Share {
  constructor(value) {
    this.value = value;
  }
}

function readCases(path) {
  const amount = /("(?:budget|amount)": )(\d+\.?\d*(?:e[-+]?\d+)?)/g;
  const mark = (all, name, digits) => (/[.e]/.test(digits) ? `${name}{"share": ${digits}}` : all);
  const revive = (_, value) => (value && value.share !== undefined ? new Share(value.share) : value);
  return JSON.parse(readFileSync(path, "utf8").replace(amount, mark), revive).cases;
}

const WORDS = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity, "-0.0": -0 };

function read(value, narrow = false) {
  if (Array.isArray(value)) return value.map((part) => read(part, narrow));
  if (typeof value === "string") return WORDS[value];
  return narrow && typeof value === "number" ? Math.fround(value) : value;
}

// The rows of an array whose leading axes are `lead`, last axis fastest; null for each if there is no array.
function rows(array, lead) {
  const count = lead.reduce((product, length) => product * length, 1);
  if (array === null) return range(count).map(() => null);
  // Integers and half precision are rounded to float32; indices are far below where that changes them.
  const narrow = !["float32", "float64", "bool"].includes(array.dtype);
  return lead.reduce((parts) => parts.flat(1), [read(array.data, narrow)]);
}

function pack(results, lead, length) {
  const remaining = results[Symbol.iterator]();
  const nest = (shape) => (shape.length ? range(shape[0]).map(() => nest(shape.slice(1))) : remaining.next().value);
  return { shape: [...lead, length], data: nest(lead) };
}

const zip = (...lists) => lists[0].map((_, index) => lists.map((list) => list[index]));
const lastOff = (shape, count = 1) => shape.slice(0, shape.length - count);

const STEPS = {
  rank({ scores, k, tiers }) {
    const lead = lastOff(scores.shape);
    const found = zip(rows(scores, lead), rows(tiers, lead)).map(([score, tier]) => order(score, tier).slice(0, k));
    return { order: pack(found, lead, Math.min(k, scores.shape.at(-1))) };
  },
  build_graph({ keys, importance, num_sources, num_neighbors, valid }) {
    const lead = lastOff(importance.shape);
    const numTokens = importance.shape.at(-1);
    const numSources = Math.min(num_sources, numTokens);
    const numNeighbors = Math.min(num_neighbors, numTokens - numSources);
    const found = zip(rows(keys, lead), rows(importance, lead), rows(valid, lead)).map(([key, score, ok]) => {
      const graph = buildGraph(key, score, numSources, numNeighbors, ok, keys.dtype !== "float64");
      return {
        sources: graph.sources.filter((i) => !ok || ok[i]),
        edges: graph.sources.flatMap((source, place) =>
          graph.edges[place].filter(([, weight]) => weight > 0).map(([j, weight]) => [source, j, weight]),
        ),
      };
    });
    return { sources_shape: [...lead, numSources], neighbors_shape: [...lead, numSources, numNeighbors], rows: found };
  },
  propagate({ importance, graph, ...options }) {
    const lead = lastOff(importance.shape);
    const found = zip(rows(importance, lead), rows(graph.neighbors, lead), rows(graph.weights, lead)).map(
      ([score, neighbors, weights]) => propagate(score, neighbors, weights, options),
    );
    return { scores: pack(found, lead, importance.shape.at(-1)) };
  },
  degree({ keys, valid }) {
    const lead = lastOff(keys.shape, 2);
    const found = zip(rows(keys, lead), rows(valid, lead)).map(([key, ok]) => degree(key, ok, keys.dtype !== "float64"));
    return { degree: pack(found, lead, keys.shape.at(-2)) };
  },
  fuse({ importance, degree: degrees, fusion, exponent, valid }) {
    const lead = lastOff(importance.shape);
    const found = zip(rows(importance, lead), rows(degrees, lead), rows(valid, lead)).map(([score, c, ok]) =>
      fuse(score, c, fusion, exponent, ok),
    );
    return { scores: pack(found, lead, importance.shape.at(-1)) };
  },
  pagerank({ importance, keys, damping, rounds, valid }) {
    const lead = lastOff(importance.shape);
    const narrow = ![keys.dtype, importance.dtype].includes("float64");
    const found = zip(rows(importance, lead), rows(keys, lead), rows(valid, lead)).map(([score, key, ok]) =>
      pagerank(score, key, damping, rounds, ok, narrow),
    );
    return { scores: pack(found, lead, importance.shape.at(-1)) };
  },
  select({ scores, budget, protected: first, valid }) {
    const lead = lastOff(scores.shape);
    const found = zip(rows(scores, lead), rows(first, lead), rows(valid, lead)).map(([score, one, ok]) =>
      select(score, budget, one, ok),
    );
    return { kept: pack(found, lead, Math.min(budget, scores.shape.at(-1))) };
  },
  sum_rows({ rows: table, into, num_slots }) {
    const lead = lastOff(table.shape, 2);
    const size = table.shape.at(-1);
    const found = zip(rows(table, lead), rows(into, lead)).map(([row, slots]) => sumRows(row, slots, num_slots, size));
    return { sums: { ...pack(found, lead, size), shape: [...lead, num_slots, size] } };
  },
  evict({ policy, keys, values, queries, valid }) {
    const [batch, numHeads, numTokens, size] = keys.shape;
    const { budget, num_sinks } = policy.base;
    const groups = queries.shape[1] / numHeads;
    const found = range(batch * numHeads).map((row) => {
      const [b, h] = [Math.floor(row / numHeads), row % numHeads];
      const [key, value] = [keys, values].map((array) => read(array.data[b][h]));
      const ok = valid ? valid.data[b] : key.map(() => true);
      // StreamingLLM: the position without padding, and 0 for the sinks, which come first.
      const place = ok.map((_, j) => ok.slice(0, j).filter(Boolean).length);
      const isSink = place.map((rank, j) => Boolean(ok[j]) && rank < num_sinks);
      const scores = place.map((rank, j) => (isSink[j] ? 0 : rank));
      const kept = select(scores, budget, isSink, ok);
      const heads = read(queries.data[b].slice(h * groups, (h + 1) * groups));
      const weights = policy.weights === "count" ? ok.map(() => 1) : meanReceived(key, heads, policy.window, ok);
      return { kept, scores, slots: absorb(key, value, weights, kept, isSink, ok, policy.threshold) };
    });
    const [lead, numSlots] = [[batch, numHeads], Math.min(budget, numTokens)];
    const packed = (results, ...shape) => ({ ...pack(results, lead, 0), shape: [...lead, ...shape] });
    return {
      budget: numSlots,
      kept: packed(found.map(({ kept }) => kept), numSlots),
      importance: packed(found.map(({ scores }) => scores), numTokens),
      scores: packed(found.map(({ scores }) => scores), numTokens),
      keys: packed(found.map(({ slots }) => slots.map(({ key }) => key)), numSlots, size),
      values: packed(found.map(({ slots }) => slots.map(({ value }) => value)), numSlots, values.shape[3]),
      log_mass: packed(found.map(({ slots }) => slots.map(({ logMass }) => logMass)), numSlots),
    };
  },
  budget_tokens: ({ budget, num_tokens }) => ({ count: budgetTokens(budget, num_tokens) }),
  ratio_count: ({ amount, total }) => ({ count: ratioCount(amount, total) }),
};

// Whether a result is the expected one; dtypes do not count, and null stands for any value.
function same(expected, got, tolerance) {
  if (expected === null) return true;
  if (Array.isArray(expected)) {
    const fits = Array.isArray(got) && got.length === expected.length;
    return fits && expected.every((part, index) => same(part, got[index], tolerance));
  }
  if (typeof expected === "object") {
    const names = Object.keys(expected).filter((name) => name !== "dtype");
    return names.every((name) => got && name in got && same(expected[name], got[name], tolerance));
  }
  return typeof got === "number" && close(read(expected), got, tolerance);
}

function close(expected, got, tolerance) {
  if (expected === got || (Number.isNaN(expected) && Number.isNaN(got))) return true;
  if (tolerance === null || !Number.isFinite(expected)) return false;
  return Math.abs(got - expected) <= tolerance.absolute + tolerance.relative * Math.abs(expected);
}

function main(paths) {
  const folder = join(dirname(fileURLToPath(import.meta.url)), "..", "vectors");
  let failed = false;
  for (const path of paths.length ? paths : FILES.map((name) => join(folder, `${name}.json`))) {
    const cases = readCases(path).filter(isOurs);
    const wrong = cases.filter((one) => !same(one.expected, STEPS[one.step](one.arguments), one.tolerance));
    const result = `${cases.length - wrong.length} of ${cases.length} cases passed`;
    console.log(`${basename(path)}: ${result}`, ...wrong.map((one) => one.name));
    failed ||= wrong.length > 0;
  }
  return failed ? 1 : 0;
}

process.exitCode = main(process.argv.slice(2));
