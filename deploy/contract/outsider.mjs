// Reads a fleet's rounds, checks each message against asyncapi.json, and prints a line of JSON for
// each round that closed. Ends with the job; exit code 1 if a message did not conform.
//
//   npm ci
//   node outsider.mjs [--servers nats://host:4222,...] [--job NAME]
//                     [--creds outsider.creds] [--ca ca.pem] [--tls-name seedwire]
//
// The environment does as well: SEEDWIRE_SERVERS, SEEDWIRE_CREDS, SEEDWIRE_CA, SEEDWIRE_TLS_NAME.

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { decode } from "@msgpack/msgpack";
import Ajv from "ajv";
import { connect, credsAuthenticator } from "nats";

const { values: given } = parseArgs({
  options: {
    servers: { type: "string", default: process.env.SEEDWIRE_SERVERS ?? "nats://127.0.0.1:4222" },
    creds: { type: "string", default: process.env.SEEDWIRE_CREDS ?? "" },
    ca: { type: "string", default: process.env.SEEDWIRE_CA ?? "" },
    "tls-name": { type: "string", default: process.env.SEEDWIRE_TLS_NAME ?? "seedwire" },
    job: { type: "string", default: "*" },
  },
});

const contract = JSON.parse(readFileSync(new URL("asyncapi.json", import.meta.url), "utf8"));

/** The channel of the contract whose subjects are read, and a check for each of its messages. */
function channel(name) {
  const { address, messages } = contract.channels[name];
  const ajv = new Ajv({ strict: false, allErrors: true });
  ajv.addKeyword({
    keyword: "x-messagepack",
    validate: (kind, data) => kind === "bin" && data instanceof Uint8Array,
  });
  ajv.addKeyword({ keyword: "x-max-bytes", validate: (most, data) => data.length <= most });
  ajv.addSchema(contract, "contract");
  const headers = ajv.compile({
    $ref: "contract#/components/messageTraits/republished/headers",
  });
  const payloads = Object.fromEntries(
    Object.entries(messages).map(([type, message]) => [
      type,
      ajv.compile({ $ref: `contract${message.payload.$ref}` }),
    ]),
  );
  /** What is wrong with a message, or nothing; a type that is not in the contract is newer. */
  function complaint(event, received) {
    const check = payloads[event.type];
    if (check === undefined) return "";
    if (!check(event)) return ajv.errorsText(check.errors);
    return headers(received) ? "" : ajv.errorsText(headers.errors);
  }
  return { subject: address.replace("{job}", given.job), complaint };
}

const { subject, complaint } = channel("events");
const servers = given.servers.split(",").map((server) => server.trim());
const connection = await connect({
  servers,
  name: "outsider",
  maxReconnectAttempts: -1,
  authenticator: given.creds ? credsAuthenticator(readFileSync(given.creds)) : undefined,
  // A fleet's own certificate is made out to "seedwire", wherever its broker runs.
  tls: given.ca ? { caFile: given.ca, servername: given["tls-name"] } : undefined,
});
const subscription = connection.subscribe(subject);
await connection.flush();
console.error(`reading ${subject} at ${servers.join(", ")}`);
process.once("SIGTERM", () => connection.drain());

let checked = 0;
const lastOf = new Map();
let measured;
for await (const message of subscription) {
  const headers = Object.fromEntries(
    (message.headers?.keys() ?? []).map((key) => [key, message.headers.get(key)]),
  );
  if ("Nats-Num-Pending" in headers) continue; // somebody's reading of the log, sent here
  const event = decode(message.data);
  const wrong = complaint(event, headers);
  checked += 1;
  if (wrong) {
    console.error(JSON.stringify({ error: wrong, type: event.type, job: event.job }));
    process.exitCode = 1;
  }
  // Whoever needs every fact fills such a gap by Direct Get; this program only says so.
  const [before, sequence] = ["Nats-Last-Sequence", "Nats-Sequence"].map((name) =>
    Number(headers[name] ?? 0),
  );
  if (before > (lastOf.get(event.job) ?? before)) {
    console.error(JSON.stringify({ gap: [lastOf.get(event.job), sequence], job: event.job }));
  }
  lastOf.set(event.job, sequence);
  if (event.type === "AdapterEvaluated") {
    measured = event;
  }
  if (event.type === "RoundClosed") {
    const { job, round, reason, devices, loss, digest } = event;
    const terms = (event.commit?.terms ?? []).map((term) => term.coefficients.length / 4);
    const accuracy = measured?.examples ? measured.correct / measured.examples : null;
    const coefficients = terms.reduce((sum, count) => sum + count, 0);
    console.log(
      JSON.stringify({ job, round, reason, devices, loss, accuracy, coefficients, digest, checked }),
    );
    measured = undefined;
  }
  if (event.type === "JobEnded") break;
}
await connection.drain();
