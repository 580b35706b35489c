// The live parts of the page: fetched as the page itself, and brought over piece by piece, so that focus, choices and
// what is folded open stay as they are. Without this script the page is the same, as of the moment it was loaded.
"use strict";

const byId = (id) => document.getElementById(id);
const meta = (name) => document.querySelector(`meta[name="${name}"]`).content;
const kept = {
  get(key, otherwise) {
    try { return JSON.parse(sessionStorage.getItem(key)) ?? otherwise; } catch { return otherwise; }
  },
  set(key, value) {
    try { sessionStorage.setItem(key, JSON.stringify(value)); } catch { /* private windows may keep nothing */ }
  },
};

// -- times in the reader's own zone -------------------------------------------------------------------------------
function writeClocks(root) {
  for (const time of root.querySelectorAll("time[data-clock]")) {
    const moment = new Date(time.dateTime);
    time.textContent = moment.toLocaleTimeString([], { hour12: false });
    time.title = moment.toLocaleString();
  }
}

// -- bringing over ------------------------------------------------------------------------------------------------
function bringOver(from, to) {
  for (const { name, value } of [...from.attributes]) {
    if (to.getAttribute(name) !== value) to.setAttribute(name, value);
  }
  for (const { name } of [...to.attributes]) {
    if (name !== "open" && !from.hasAttribute(name)) to.removeAttribute(name); // what a reader folded open stays so
  }
  const old = new Map([...to.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = to.firstChild;
  for (const node of [...from.childNodes]) {
    const known = node.id ? old.get(node.id) : null;
    if (known && known !== at) to.insertBefore(known, at);
    const here = known ?? at;
    const isSame = here && here.nodeType === node.nodeType && here.nodeName === node.nodeName
      && (here.id ?? "") === (node.id ?? "");
    if (!isSame) {
      to.insertBefore(document.importNode(node, true), at);
    } else {
      if (node.nodeType === Node.ELEMENT_NODE) bringOver(node, here);
      else if (here.nodeValue !== node.nodeValue) here.nodeValue = node.nodeValue;
      at = here.nextSibling;
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

// -- the small curves ---------------------------------------------------------------------------------------------
const CURVE_LENGTH = 90;
const SVG = "http://www.w3.org/2000/svg";
let answeredBefore = kept.get("answered", null);

function noteRate() {
  const rate = document.querySelector("[data-rate]");
  if (!rate || rate.dataset.value === "") return null;
  const now = { value: Number(rate.dataset.value), at: Number(rate.dataset.at) };
  const before = answeredBefore;
  answeredBefore = now;
  kept.set("answered", now);
  if (!before || now.at <= before.at || now.at - before.at > 60 || now.value < before.value) return null;
  return (now.value - before.value) / (now.at - before.at);
}

function draw(svg, values) {
  const most = Math.max(...values, 1);
  const points = values.map((value, i) => {
    const x = (100 * i) / (CURVE_LENGTH - 1);
    return `${x.toFixed(1)},${(27 - (25 * value) / most).toFixed(1)}`;
  });
  svg.setAttribute("viewBox", "0 0 100 28");
  svg.setAttribute("preserveAspectRatio", "none");
  const last = points.at(-1).split(",")[0];
  const shapes = [["under", `M0,28L${points.join("L")}L${last},28Z`], ["", `M${points.join("L")}`]];
  svg.replaceChildren(...shapes.map(([name, shape]) => {
    const path = document.createElementNS(SVG, "path");
    if (name) path.setAttribute("class", name);
    path.setAttribute("d", shape);
    return path;
  }));
}

function drawCurves() {
  const rate = noteRate();
  if (rate !== null) {
    const told = document.querySelector("[data-rate]");
    told.textContent = `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} a second now`;
  }
  for (const svg of document.querySelectorAll("[data-spark]")) {
    const isRate = svg.dataset.spark === "rate";
    const value = isRate ? rate : svg.dataset.value === "" ? null : Number(svg.dataset.value);
    const values = kept.get(`curve.${svg.dataset.spark}`, []);
    if (value !== null) values.push(value);
    while (values.length > CURVE_LENGTH) values.shift();
    kept.set(`curve.${svg.dataset.spark}`, values);
    if (values.length > 1) draw(svg, values);
  }
}

// -- asking for news ----------------------------------------------------------------------------------------------
const refreshMs = 1000 * Number(meta("muai-refresh-s"));
let isPaused = kept.get("paused", false);
let failures = 0;
let timer = null;

function tell(text) {
  if (byId("notice").textContent !== text) byId("notice").textContent = text;
}

function setStale(isStale) {
  for (const part of document.querySelectorAll("[data-live]")) part.toggleAttribute("data-stale", isStale);
  byId("pulse").dataset.state = isStale ? "late" : isPaused ? "off" : "live";
}

async function refresh() {
  clearTimeout(timer);
  try {
    const answer = await fetch(location.pathname + location.search, {
      headers: { accept: "text/html" },
      signal: AbortSignal.timeout(10_000),
    });
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const kind = page.querySelector("[data-page]")?.dataset.page;
    if (kind === "sign-in") {
      tell("Your session has ended. Load the page anew to sign in.");
      setStale(true);
      return;
    }
    if (kind !== "console") throw new Error(`HTTP ${answer.status}`);
    failures = 0;
    writeClocks(page);
    for (const part of page.querySelectorAll("[data-live]")) {
      const here = byId(part.id);
      if (here) bringOver(part, here);
    }
    byId("pulse-text").replaceChildren(...page.querySelector("#pulse-text").childNodes);
    tell("");
    setStale(false);
    drawCurves();
  } catch {
    failures += 1;
    if (failures > 1) {
      tell("The gateway does not answer; what you see is from before. Trying again.");
      setStale(true);
    }
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!isPaused && !document.hidden) timer = setTimeout(refresh, refreshMs * Math.min(8, 2 ** Math.max(0, failures - 1)));
}

function showPause() {
  const button = byId("pause");
  button.hidden = false;
  button.setAttribute("aria-pressed", String(isPaused));
  button.textContent = isPaused ? "Go on" : "Pause";
  byId("pulse").dataset.state = isPaused ? "off" : "live";
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  kept.set("paused", isPaused);
  showPause();
  if (isPaused) clearTimeout(timer);
  else refresh();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !isPaused) refresh();
  else clearTimeout(timer);
});

// -- light and dark -----------------------------------------------------------------------------------------------
const THEMES = ["auto", "light", "dark"];
byId("theme").hidden = false;
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  root.dataset.theme = next;
  byId("theme-name").textContent = next;
  document.cookie = `muai_theme=${next}; Path=/; Max-Age=31536000; SameSite=Strict`;
});
byId("theme-name").textContent = document.documentElement.dataset.theme;

// The list of what was answered is the newest after a try: tryit.js asks for it.
document.addEventListener("muai-refresh", refresh);
writeClocks(document);
drawCurves();
showPause();
schedule();
