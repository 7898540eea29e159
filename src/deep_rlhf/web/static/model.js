"use strict";
// The second tab: what is replaced keeps what was opened, and waits while somebody is in it with the keyboard.
(() => {
  const stale = new Set(); // parts that were not replaced
  let open = [];
  let scrolled = [];

  document.body.addEventListener("htmx:beforeRequest", (event) => {
    const part = event.detail.elt;
    const byItself = !["change", "submit"].includes(event.detail.requestConfig.triggeringEvent?.type);
    if (byItself && part.contains(document.activeElement)) {
      stale.add(part);
      event.preventDefault();
    }
  });
  document.body.addEventListener("focusout", () => {
    setTimeout(() => {
      for (const part of stale) {
        if (part.contains(document.activeElement)) continue;
        stale.delete(part);
        htmx.trigger(part, "stale");
      }
    });
  });
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    open = [...event.detail.target.querySelectorAll("details[open][id]")].map((details) => details.id);
    scrolled = [...event.detail.target.querySelectorAll(".table")].map((table) => table.scrollLeft);
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    event.detail.target.querySelectorAll(".table").forEach((table, i) => (table.scrollLeft = scrolled[i] ?? 0));
  });
  document.body.addEventListener("htmx:responseError", (event) => {
    if (event.detail.xhr.status === 401) location.assign("/login");
  });
})();
