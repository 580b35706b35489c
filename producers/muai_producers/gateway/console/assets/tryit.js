// The box for trying models out. It calls the API as any client does; the token tells the gateway that the call comes
// from a page of its own, which the session's cookie alone would not.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const form = byId("try-form");
  const select = byId("try-model");
  const out = byId("try-out");
  const figures = byId("try-figures");
  const token = document.querySelector('meta[name="muai-token"]').content;
  const KINDS = {
    "chat": { label: "What to say", hint: "The answer appears as it is generated.", tokens: true },
    "text-generation": { label: "The text to go on with", hint: "It goes on as it is generated.", tokens: true },
    "embedding": { label: "Texts, one a line", hint: "Several lines are compared with the first.", tokens: false },
    "text-classification": { label: "The text to classify", hint: "", tokens: false },
    "summarization": { label: "The text to sum up", hint: "", tokens: true },
  };
  const MAX_LINES = 20;
  const SVG = "http://www.w3.org/2000/svg";
  let running = null;

  const task = () => select.selectedOptions[0]?.dataset.task;

  function showKind() {
    const kind = KINDS[task()];
    if (!kind) return;
    byId("try-text-label").textContent = kind.label;
    byId("try-hint").textContent = kind.hint;
    byId("try-knobs").hidden = !kind.tokens;
  }

  async function call(path, body) {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json", "x-muai-console": token },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    if (!answer.ok) {
      const told = await answer.json().catch(() => null);
      throw new Error(told?.error?.message ?? `the gateway answered with HTTP ${answer.status}`);
    }
    return answer;
  }

  // Server-sent events, as fetch gives them: pieces that end anywhere.
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
        const line = buffer.slice(0, end).split("\n").find((one) => one.startsWith("data: "));
        if (line) yield line.slice(6);
      }
    }
  }

  function follow(id) {
    const link = document.createElement("a");
    link.href = `/?request=${encodeURIComponent(id)}#requests`;
    link.textContent = "its way";
    figures.append(" · ", link);
  }

  async function generate(path, body, textOf) {
    const began = performance.now();
    let first = null, id = null, tokens = null;
    const answer = await call(path, {
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      max_tokens: Number(byId("try-tokens").value) || 128,
      temperature: Number(byId("try-temperature").value) || 0,
    });
    for await (const data of events(answer)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      id ??= chunk.id?.replace(/^(chat)?cmpl-/, "");
      tokens = chunk.usage?.completion_tokens ?? tokens;
      const text = chunk.choices?.[0] ? textOf(chunk.choices[0]) : "";
      if (text) {
        first ??= performance.now() - began;
        out.append(text);
      }
    }
    const took = performance.now() - began;
    const parts = [`first text after ${Math.round(first ?? took)} ms`, `all of it after ${Math.round(took)} ms`];
    if (tokens) parts.push(`${tokens} tokens, ${((1000 * tokens) / took).toFixed(1)} a second`);
    figures.textContent = parts.join(" · ");
    if (id) follow(id);
  }

  function drawVector(vector) {
    const svg = document.createElementNS(SVG, "svg");
    const most = Math.max(...vector.map(Math.abs)) || 1;
    svg.setAttribute("viewBox", `0 -1 ${vector.length} 2`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "vector");
    svg.setAttribute("aria-hidden", "true");
    for (const [i, value] of vector.entries()) {
      const bar = document.createElementNS(SVG, "rect");
      bar.setAttribute("class", value < 0 ? "down" : "up");
      bar.setAttribute("x", i);
      bar.setAttribute("width", 1);
      bar.setAttribute("y", value < 0 ? 0 : -value / most);
      bar.setAttribute("height", Math.abs(value) / most);
      svg.append(bar);
    }
    return svg;
  }

  function likeness(a, b) {
    const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
    return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b) || 1);
  }

  async function embed(model, text) {
    const lines = text.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, MAX_LINES);
    const began = performance.now();
    const told = await (await call("/v1/embeddings", { model, input: lines })).json();
    const took = performance.now() - began;
    const vectors = told.data.map((one) => one.embedding);
    for (const [i, vector] of vectors.entries()) {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      const like = i ? `${likeness(vectors[0], vector).toFixed(3)} like the first: ` : "";
      caption.textContent = `${like}${lines[i]}`;
      figure.append(drawVector(vector), caption);
      out.append(figure);
    }
    figures.textContent = `${vectors.length} × ${vectors[0].length} numbers after ${Math.round(took)} ms`;
  }

  async function infer(model, text) {
    const body = { model, inputs: text };
    if (KINDS[task()].tokens) body.parameters = { max_tokens: Number(byId("try-tokens").value) || 128 };
    const told = await (await call("/v1/inference?wait=60", body)).json();
    if (told.error) throw new Error(told.error.message);
    if (told.result?.outputs.text !== undefined) out.append(told.result.outputs.text);
    else if (told.result?.outputs.labels) {
      out.append(told.result.outputs.labels.map((one) => `${one.score.toFixed(3)}  ${one.label}`).join("\n"));
    } else out.append(told.result ? JSON.stringify(told.result.outputs, null, 1) : "It is accepted, and takes longer.");
    figures.textContent = told.result ? `answered by ${told.result.engine_used}` : "";
    follow(told.id);
  }

  async function send() {
    const text = byId("try-text").value;
    const model = select.value;
    const kind = task();
    if (kind === "chat") {
      const messages = [{ role: "user", content: text }];
      await generate("/v1/chat/completions", { model, messages }, (choice) => choice.delta?.content ?? "");
    } else if (kind === "text-generation") {
      await generate("/v1/completions", { model, prompt: text }, (choice) => choice.text ?? "");
    } else if (kind === "embedding") await embed(model, text);
    else await infer(model, text);
  }

  function setBusy(isBusy) {
    byId("try-go").disabled = isBusy;
    byId("try-stop").hidden = !isBusy;
    out.toggleAttribute("data-busy", isBusy);
    out.setAttribute("aria-busy", String(isBusy));
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    out.hidden = false;
    out.classList.remove("error");
    out.replaceChildren();
    figures.textContent = "";
    setBusy(true);
    try {
      await send();
    } catch (error) {
      const isStopped = error.name === "AbortError";
      if (!isStopped) out.classList.add("error");
      out.append(isStopped ? " (stopped)" : error.message);
    } finally {
      running = null;
      setBusy(false);
      document.dispatchEvent(new Event("muai-refresh"));
    }
  });
  byId("try-stop").addEventListener("click", () => running?.abort());
  byId("try-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  select.addEventListener("change", showKind);
  if (select.options.length) {
    form.hidden = false;
    showKind();
  }
})();
