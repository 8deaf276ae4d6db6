// What a page does beyond reading and plain forms: search as you type, keys, a run's log as it grows.
"use strict";

const one = (selector, from = document) => from.querySelector(selector);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];

// -- search as you type ---------------------------------------------------------------------------

const search = one("#search");
if (search) {
  const list = one("#cards");
  const chosen = new Set();
  let asked = null;

  const query = () => {
    const told = new URLSearchParams();
    for (const [name, value] of new FormData(search)) if (value) told.append(name, value);
    return told.toString();
  };

  const look = async () => {
    asked?.abort();
    asked = new AbortController();
    const told = query();
    list.setAttribute("aria-busy", "true"); // the first search by meaning takes seconds
    try {
      const answer = await fetch(`/cards?${told}`, { signal: asked.signal });
      if (!answer.ok) return search.submit(); // the page says what is wrong
      list.innerHTML = await answer.text(); // escaped where it was made
    } catch (error) {
      if (error.name !== "AbortError") search.submit();
      return;
    }
    list.removeAttribute("aria-busy");
    history.replaceState(null, "", told ? `/?${told}` : "/");
    for (const box of all("input[name=c]", list)) box.checked = chosen.has(box.value);
    list.dataset.query = told;
  };

  let soon = 0;
  search.addEventListener("input", () => {
    clearTimeout(soon);
    soon = setTimeout(look, 40);
  });
  search.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(soon);
    look();
  });

  // -- side by side -------------------------------------------------------------------------------

  const said = one("#chosen");
  const tell = () => {
    const names = [...chosen].join(", ");
    said.textContent = names ? `Side by side: ${names}` : "Tick cards to put them side by side.";
  };
  list.addEventListener("change", (event) => {
    if (event.target.name !== "c") return;
    if (event.target.checked) chosen.add(event.target.value);
    else chosen.delete(event.target.value);
    tell();
  });
  one("#comparison").addEventListener("submit", (event) => {
    event.preventDefault(); // ticked cards count also while a search hides them
    if (chosen.size < 2) {
      said.textContent = "Tick two cards or more.";
      return;
    }
    location.href = `/compare?${new URLSearchParams([...chosen].map((name) => ["c", name]))}`;
  });
  for (const box of all("input[name=c]:checked", list)) chosen.add(box.value);
  tell();

  // -- keys ---------------------------------------------------------------------------------------

  document.addEventListener("keydown", (event) => {
    const field = one("#q");
    const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      field.focus();
      field.select();
      return;
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const links = all(".card h2 a", list);
    const at = links.indexOf(document.activeElement);
    if (!step || !links.length || (at < 0 && document.activeElement !== field)) return;
    event.preventDefault();
    if (at + step < 0) field.focus();
    else links[Math.min(at + step, links.length - 1)].focus();
  });
}

// -- a run as it goes on --------------------------------------------------------------------------

const log = one("#log[data-run]");
if (log) {
  const base = `/runs/${log.dataset.run}`;
  let after = Number(log.dataset.after);
  const progress = one("#progress");
  const events = new EventSource(`${base}/events?after=${after}`);
  events.addEventListener("line", (event) => {
    const line = JSON.parse(event.data);
    if (line.number <= after) return; // told again after a lost connection
    after = line.number;
    const end = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const shown = document.createElement("span");
    shown.className = line.stream;
    shown.textContent = line.text;
    log.append(shown, "\n");
    if (end) log.scrollTop = log.scrollHeight;
  });
  events.addEventListener("progress", (event) => {
    progress.textContent = JSON.parse(event.data);
  });
  events.addEventListener("end", () => {
    events.close();
    location.reload(); // with the reports
  });
  events.addEventListener("error", () => {
    progress.textContent = "The connection to the server was lost; trying again.";
  });
}
