// Builds a history by clicks and shows the list that follows. Titles come from others: they are set as text, never as markup.
"use strict";

const TOP_K = 10;
const WAIT_MS = 150; // after a key, before a search
const at = (id) => document.getElementById(id);
const history = []; // {item_id, title}
let token = ""; // kept by this page alone
let members = false;
let asked = 0, searched = 0, timer = 0; // an answer to an older question is dropped

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, label, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

async function call(path, body) {
  const headers = body ? { "content-type": "application/json" } : {};
  if (token) headers.authorization = `Bearer ${token}`;
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const value = await reply.json().catch(() => ({}));
  if (reply.status === 401) at("access").hidden = false;
  if (!reply.ok) throw new Error(value.error || `the server answered with ${reply.status}`);
  return value;
}

async function start() {
  try {
    const model = await call("v1/model");
    members = model.members.length > 0;
    at("model").textContent = `${model.name}: ${model.method.kind}, ${model.num_items.toLocaleString("en")} items, model ${model.model}`;
    at("access").hidden = true;
    await recommend();
  } catch (fault) {
    at("model").textContent = fault.message;
  }
}

async function search() {
  const words = at("search").value.trim(), number = ++searched;
  try {
    const items = words ? (await call(`v1/items?q=${encodeURIComponent(words)}`)).items : [];
    if (number !== searched) return;
    at("found").replaceChildren(...items.map((item) => {
      const line = element("li");
      line.append(button(item.title, `Add ${item.title}`, () => add(item)));
      return line;
    }));
    if (words && !items.length) at("found").append(element("li", "", "No title has these words"));
  } catch (fault) {
    at("found").replaceChildren(element("li", "", fault.message));
  }
}

function add(item) {
  history.push(item);
  showHistory();
  recommend();
}

function remove(place) {
  history.splice(place, 1);
  showHistory();
  recommend();
  const left = at("history").querySelectorAll("button");
  (left[Math.min(place, left.length - 1)] || at("search")).focus();
}

function showHistory() {
  at("no-history").hidden = history.length > 0;
  at("clear").hidden = history.length === 0;
  at("history").replaceChildren(...history.map((item, place) => {
    const line = element("li"), row = element("div");
    row.append(element("span", "", item.title), button("Remove", `Remove ${item.title}`, () => remove(place)));
    line.append(row);
    return line;
  }));
}

async function recommend() {
  const number = ++asked, began = performance.now();
  at("status").textContent = "Asking";
  try {
    const body = { history: history.map((item) => item.item_id), top_k: TOP_K, members };
    const reply = await call("v1/rank", body);
    if (number !== asked) return;
    const whole = Math.round(performance.now() - began), inside = (reply.seconds * 1000).toFixed(1);
    const order = reply.fallback ? " by popularity" : "";
    at("status").textContent = `${reply.items.length} items${order}, in ${whole} ms (${inside} ms in the server)`;
    at("list").replaceChildren(...reply.items.map((item) => row(item, largest(reply.items))));
    at("legend").hidden = !reply.items.some((item) => item.members);
  } catch (fault) {
    if (number !== asked) return;
    at("status").textContent = fault.message;
    at("list").replaceChildren();
    at("legend").hidden = true;
  }
}

function largest(items) {
  return Math.max(...items.flatMap((item) => Object.values(item.members || {}).map((value) => Math.abs(value ?? 0))), 1e-12);
}

function row(item, most) {
  const line = element("li"), top = element("div", "line");
  top.append(element("span", "title", item.title), element("span", "score", shown(item.score)));
  line.append(top);
  if (item.members) {
    const bars = element("ul", "members");
    for (const [name, value] of Object.entries(item.members)) {
      const member = element("li"), track = element("span", "track"), bar = element("div", value < 0 ? "bar lowers" : "bar");
      bar.style.width = `${(100 * Math.abs(value ?? 0)) / most}%`;
      track.setAttribute("aria-hidden", "true"); // the number beside it says the same
      track.append(bar);
      member.append(element("span", "name", name), track, element("span", "score", shown(value)));
      bars.append(member);
    }
    line.append(bars);
  }
  return line;
}

function shown(score) {
  return score === null ? "-∞" : score.toFixed(3);
}

document.addEventListener("DOMContentLoaded", () => {
  at("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, WAIT_MS);
  });
  at("clear").addEventListener("click", () => {
    history.length = 0;
    showHistory();
    recommend();
    at("search").focus();
  });
  at("access").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    start();
  });
  start();
});
