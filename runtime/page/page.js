// The page at /: chat with the server that serves it. Streams /v1/chat/completions with `details`, and shows for each
// token whether it is the main model's own or an accepted draft. What a model says is inserted as text, never as HTML.

const KEY = "tandem-api-key";
const MANY = new Intl.NumberFormat("en");
const PARTS = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const SPACE_BELOW = 120; // pixels below a growing answer: in one column the first statistics stand there
const find = (id) => document.getElementById(id);

/** A response that is not a success: the server's own words. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The data of the server-sent events of a body. Lines and characters may be split over its chunks in any way. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a \r at the end may be half of a \r\n
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) yield data.splice(0).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  });
  if (response.ok) return response;
  const text = await response.text();
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // not the server itself but something before it: its text is shown
  }
  const wait = response.headers.get("Retry-After");
  throw new Refusal(response.status, `${response.status}: ${message}${wait ? ` (again in ${wait} s)` : ""}`);
}

// --- an answer, and its statistics

/** One answer as it comes: its element, its text, and the last statistics the server sent for it. */
class Answer {
  content = "";
  statistics = null;
  reason = null; // why it ended
  first = null; // milliseconds to its first token, as seen from here
  begun = performance.now();

  constructor(element) {
    this.element = element;
    this.text = element.querySelector(".text");
  }

  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices[0];
    const { tokens = [], ...statistics } = chunk.tandem ?? {};
    const content = choice?.delta.content ?? "";
    if (content !== tokens.map((token) => token.text).join("")) {
      throw new Error("The server’s details do not add up to the text of its answer.");
    }
    this.content += content;
    if (chunk.tandem) this.statistics = statistics;
    if (chunk.usage) {
      const { completion_tokens, prompt_tokens, prompt_tokens_details: prompt, rounds } = chunk.usage;
      const cached = prompt?.cached_tokens;
      this.statistics = { ...this.statistics, completion_tokens, prompt_tokens, cached, rounds };
    }
    if (tokens.length) this.first ??= performance.now() - this.begun;
    this.reason = choice?.finish_reason ?? this.reason;
    this.#append(tokens);
  }

  #append(tokens) {
    let round = this.statistics?.rounds;
    const spans = tokens.toReversed().map(({ text, draft }, i) => {
      if (i && !draft) round--; // a round ends with the model's own token, and a chunk may hold several
      const span = document.createElement("span");
      span.className = draft ? `token draft draft-${draft}` : "token verified";
      span.dataset.draft = draft;
      span.dataset.round = round;
      span.textContent = text;
      return span;
    });
    this.text.append(...spans.reverse().filter((span) => span.textContent));
  }

  /** What stands below it: how many tokens in how many rounds, and why it ended. */
  finish(ending) {
    const { completion_tokens: tokens, rounds } = this.statistics ?? { completion_tokens: 0 };
    const parts = [`${MANY.format(tokens)} ${tokens === 1 ? "token" : "tokens"}`];
    if (rounds) parts.push(`${perRound(this.statistics)} per round`, `${rate(this.statistics)} per second`);
    if (ending) parts.push(ending);
    this.element.querySelector(".note").textContent = parts.join(" · ");
    this.element.removeAttribute("aria-busy");
  }
}

// The first token comes with the prompt: it counts neither in rounds nor in the time of decoding.
const perRound = (s) => (s.rounds ? PARTS.format((s.completion_tokens - 1) / s.rounds) : "");
const rate = (s) => (s.decode_seconds ? MANY.format(Math.round((s.completion_tokens - 1) / s.decode_seconds)) : "");
const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${PARTS.format(ms / 1000)} s`);

function drawStatistics(answer) {
  const s = answer?.statistics;
  find("per-round").textContent = s ? perRound(s) : "";
  find("rate").textContent = s ? rate(s) : "";
  const [tokens, rounds] = [s?.completion_tokens, s?.rounds].map((count) => MANY.format(count ?? 0));
  find("completion").textContent = s ? `${tokens} tokens, ${rounds} rounds` : "";
  const cached = s?.cached ? `, ${MANY.format(s.cached)} cached` : "";
  find("prompt").textContent = s ? `${MANY.format(s.prompt_tokens)} tokens${cached}` : "";
  find("first").textContent = answer?.first ? duration(answer.first) : "";
  drawPositions(s?.drafted_per_position ?? [], s?.accepted_per_position ?? []);
}

function drawPositions(drafted, accepted) {
  const count = Math.max(drafted.findLastIndex(Boolean) + 1, Number(find("drafts").value) || 0);
  const bars = find("bars");
  while (bars.rows.length > count) bars.deleteRow(-1);
  while (bars.rows.length < count) {
    const row = find("position").content.cloneNode(true);
    const position = bars.rows.length + 1;
    for (const part of row.querySelectorAll(".draft")) part.classList.add(`draft-${position}`);
    row.querySelector("th").append(`draft ${position}`);
    bars.append(row);
  }
  [...bars.rows].forEach((row, i) => {
    const share = drafted[i] ? accepted[i] / drafted[i] : null;
    row.querySelector(".fill").style.width = `${100 * (share ?? 0)}%`;
    row.querySelector(".share").textContent = share === null ? "" : `${Math.round(100 * share)}\u00a0%`;
    row.title = drafted[i] ? `${MANY.format(accepted[i])} of ${MANY.format(drafted[i])} accepted` : "";
  });
}

// --- the conversation

const conversation = []; // messages as the server gets them, without the system message
const scroller = find("scroller");
let model = null; // of /v1/models
let running = null; // the AbortController of the answer that is on its way
let latest = null; // the Answer whose statistics are shown
let following = true; // whether the end is to stay in view
let isDrawn = true;

/** Statistics and scrolling at most once a frame, however fast tokens come. */
function draw() {
  if (!isDrawn) return;
  isDrawn = false;
  requestAnimationFrame(() => {
    isDrawn = true;
    drawStatistics(latest);
    if (following) scroller.scrollTop += Math.max(0, hiddenBelow() + SPACE_BELOW);
  });
}

/** Pixels of the messages below what is in view. */
function hiddenBelow() {
  return find("log").getBoundingClientRect().bottom - scroller.getBoundingClientRect().bottom;
}

function showError(error) {
  const asksForKey = error.status === 401;
  find("key-form").hidden = !asksForKey;
  find("error").hidden = asksForKey;
  find(asksForKey ? "key-message" : "error").textContent = error.message;
  if (asksForKey) {
    sessionStorage.removeItem(KEY);
    find("key").focus();
  }
}

async function loadModel() {
  const { data } = await (await call("v1/models")).json();
  [model] = data;
  const { mtp_k, max_mtp_k, capacity, chat, thinking } = model.tandem;
  find("model").textContent = model.id;
  const choices = max_mtp_k ? ["auto", ...Array(max_mtp_k + 1).keys()] : [0];
  find("drafts").replaceChildren(...choices.map((k) => new Option(k, k, k === mtp_k, k === mtp_k)));
  find("max-tokens").max = capacity;
  find("thinking-field").hidden = !thinking;
  if (!chat) throw new Error("This model has no chat template: it cannot be talked to here.");
  draw();
}

/** The request, from the settings. A number that is left empty is left to the server. */
function requestFor(messages) {
  const number = (id) => (find(id).value === "" ? undefined : Number(find(id).value));
  const system = find("system").value.trim();
  const drafts = find("drafts").value;
  return {
    model: model.id,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    mtp_k: drafts === "auto" ? drafts : Number(drafts),
    ...(model.tandem.thinking && { chat_template_kwargs: { enable_thinking: find("thinking").checked } }),
    stream: true,
    stream_options: { include_usage: true },
    details: true,
  };
}

async function receive(answer, messages, signal) {
  if (!model) await loadModel();
  const body = JSON.stringify(requestFor(messages));
  const headers = { "Content-Type": "application/json" };
  const response = await call("v1/chat/completions", { method: "POST", headers, body, signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    answer.add(JSON.parse(data));
    draw();
  }
  throw new Error("The connection was closed before the answer ended.");
}

function setBusy(isBusy) {
  find("send").hidden = isBusy;
  find("stop").hidden = !isBusy;
}

async function say(content) {
  const [asked, element] = find("turn").content.cloneNode(true).children;
  asked.querySelector(".text").textContent = content;
  find("empty").hidden = true;
  find("error").hidden = true;
  find("log").append(asked, element);
  const controller = new AbortController();
  const answer = new Answer(element);
  const before = latest;
  [running, latest, following] = [controller, answer, true];
  setBusy(true);
  draw();
  const question = { role: "user", content };
  let failure = null;
  await receive(answer, [...conversation, question], controller.signal).catch((error) => (failure = error));
  if (running !== controller) return; // a new conversation has begun
  running = null;
  setBusy(false);
  const isStopped = failure && controller.signal.aborted;
  if (failure && !isStopped) showError(failure);
  if (failure && !answer.content) {
    withdraw(content, asked, element);
    latest = before;
  } else {
    conversation.push(question, { role: "assistant", content: answer.content });
    const ending = answer.reason === "length" ? "cut at its limit" : "";
    answer.finish(isStopped ? "stopped" : failure ? "broken off" : ending);
  }
  draw();
}

/** A message that got no answer goes back to where it was written. */
function withdraw(content, ...elements) {
  for (const element of elements) element.remove();
  const message = find("message");
  message.value = message.value ? `${content}\n${message.value}` : content;
  find("empty").hidden = find("log").childElementCount > 0;
}

function restart() {
  running?.abort();
  running = latest = null;
  conversation.length = 0;
  find("log").replaceChildren();
  find("empty").hidden = false;
  find("error").hidden = true;
  setBusy(false);
  draw();
  find("message").focus();
}

// --- where a token comes from: by pointing at it, or with the arrow keys in an answer

let current = null;

function showOrigin(token) {
  current?.classList.remove("current");
  current = token;
  const origin = find("origin");
  origin.hidden = !token;
  if (!token) return;
  token.classList.add("current");
  const { draft, round } = token.dataset;
  const place = round === "0" ? "prompt" : `round ${round}`;
  origin.textContent = draft === "0" ? `verified, ${place}` : `draft ${draft}, ${place}`;
  const box = [...token.getClientRects()].find((rect) => rect.width) ?? token.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - origin.offsetWidth - 8);
  const above = box.top - origin.offsetHeight - 6;
  origin.style.left = `${Math.max(8, left)}px`;
  origin.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

function walk(event) {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !event.target.matches(".answer .text") || !event.target.childElementCount) return;
  event.preventDefault();
  const tokens = [...event.target.children];
  const next = Math.min(Math.max(tokens.indexOf(current) + step, 0), tokens.length - 1);
  tokens[next].scrollIntoView({ block: "nearest" });
  showOrigin(tokens[next]);
}

// --- what a person does

function listen() {
  const message = find("message");
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const content = message.value;
    if (running || !content.trim()) return;
    message.value = "";
    say(content);
  });
  message.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("composer").requestSubmit();
  });
  find("stop").addEventListener("click", () => {
    running?.abort();
    message.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && !find("settings").open) running?.abort();
  });
  find("new").addEventListener("click", restart);
  find("settings-open").addEventListener("click", () => find("settings").showModal());
  find("drafts").addEventListener("change", draw);
  find("tint").addEventListener("change", (event) => find("log").classList.toggle("plain", !event.target.checked));
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, find("key").value);
    find("key-form").hidden = true;
    find("key").value = "";
    loadModel().then(() => message.focus(), showError);
  });
  let top = 0;
  scroller.addEventListener("scroll", () => {
    following = hiddenBelow() < 32 || (following && scroller.scrollTop >= top); // it may have grown since it scrolled
    top = scroller.scrollTop;
  });
  const log = find("log");
  log.addEventListener("pointerover", (event) => showOrigin(event.target.closest(".token")));
  log.addEventListener("pointerleave", () => showOrigin(null));
  log.addEventListener("focusout", () => showOrigin(null));
  log.addEventListener("keydown", walk);
}

listen();
find("message").focus();
loadModel().catch(showError);
