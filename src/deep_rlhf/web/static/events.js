"use strict";
// What happens elsewhere: each server-sent event becomes an event of the body, the newest of a kind at most every so
// often, and never none.
(() => {
  const EVERY = { questions: 0, people: 3000, model: 3000, versions: 3000 }; // milliseconds
  const waiting = {};

  function tell(kind, detail) {
    document.body.dispatchEvent(new CustomEvent(kind, { detail }));
  }

  function tellLater(kind, detail) {
    if (!EVERY[kind]) return tell(kind, detail);
    if (kind in waiting) {
      waiting[kind] = { detail };
      return undefined;
    }
    waiting[kind] = null;
    setTimeout(() => {
      const news = waiting[kind];
      delete waiting[kind];
      if (news) tellLater(kind, news.detail);
    }, EVERY[kind]);
    return tell(kind, detail);
  }

  function connect() {
    const source = new EventSource("/events");
    for (const kind of Object.keys(EVERY)) {
      source.addEventListener(kind, (event) => tellLater(kind, JSON.parse(event.data)));
    }
    source.addEventListener("open", () => tell("connected"));
    source.addEventListener("error", () => {
      // A lost connection is taken up again by the browser; a refused one is not.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    });
    addEventListener("pagehide", () => source.close(), { once: true });
  }

  addEventListener("pageshow", connect);
})();
