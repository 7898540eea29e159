"use strict";
// The model tab: a replaced part keeps its open details, and is not replaced while it has the keyboard focus.
(() => {
  const stale = new Set(); // parts that were not replaced
  let open = [];
  let scrolled = [];
  let status = null; // the last HTML of the status

  // Whether an automatic request would take the focus away.
  function stealsFocus({ requestConfig, target }) {
    const automatic = !["change", "submit"].includes(requestConfig.triggeringEvent?.type);
    return automatic && target.contains(document.activeElement);
  }

  document.body.addEventListener("htmx:beforeRequest", (event) => {
    if (!stealsFocus(event.detail)) return;
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
    if (stealsFocus(event.detail)) {
      stale.add(requestConfig.elt); // it got the focus during the request
      event.detail.shouldSwap = false;
    } else if (target.id === "status" && event.detail.shouldSwap) {
      event.detail.shouldSwap = serverResponse !== status; // screen readers announce only changes
      status = serverResponse;
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
