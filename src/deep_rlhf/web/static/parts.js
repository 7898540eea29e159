"use strict";
// Shared by the scripts of the labelling tab: selectors, messages and announcements.
const one = (selector, inside = document) => inside.querySelector(selector);

// For screen readers.
function announce(sentence) {
  one("[data-announced]").textContent = sentence;
}

function warn(sentence, link) {
  const message = one("[data-message]");
  message.textContent = sentence;
  if (link) message.append(" ", Object.assign(document.createElement("a"), { href: link[0], textContent: link[1] }));
  message.hidden = !sentence;
}

const notSaved = (count) => `${count === 1 ? "1 label is" : `${count} labels are`} not saved yet`;

// crypto.randomUUID exists only over HTTPS and on loopback.
function randomToken() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
