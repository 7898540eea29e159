"use strict";
// The second tab: what is replaced keeps what was opened, and waits while somebody is in it with the keyboard.
(() => {
  const stale = new Set(); // parts that were not replaced
  let open = [];
  let scrolled = [];
  let now = null; // the newest state and alarms

  // Whether a request that nobody asked for would take the focus from somebody.
  function disturbs({ requestConfig, target }) {
    const byItself = !["change", "submit"].includes(requestConfig.triggeringEvent?.type);
    return byItself && target.contains(document.activeElement);
  }

  document.body.addEventListener("htmx:beforeRequest", (event) => {
    if (!disturbs(event.detail)) return;
    stale.add(event.detail.elt);
    event.preventDefault();
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
    const { target, serverResponse, requestConfig } = event.detail;
    if (disturbs(event.detail)) {
      stale.add(requestConfig.elt); // the focus came while the request was under way
      event.detail.shouldSwap = false;
    } else if (target.id === "now" && event.detail.shouldSwap) {
      event.detail.shouldSwap = serverResponse !== now; // what has not changed is not read aloud again
      now = serverResponse;
    }
    open = [...target.querySelectorAll("details[open][id]")].map((details) => details.id);
    scrolled = [...target.querySelectorAll(".table")].map((table) => table.scrollLeft);
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    event.detail.target.querySelectorAll(".table").forEach((table, i) => (table.scrollLeft = scrolled[i] ?? 0));
  });
  document.body.addEventListener("htmx:responseError", (event) => {
    if (event.detail.xhr.status === 401) location.assign("/login");
  });
})();
