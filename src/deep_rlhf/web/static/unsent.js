"use strict";
// What a person has said and the server has not acknowledged. It outlives a reload, in the browser's own storage,
// under the person's name, so that nobody else who uses this browser sends it as his.
class Unsent {
  constructor(person) {
    this.prefix = `deep-rlhf unsent ${person} `;
    this.memory = new Map(); // where the browser stores nothing
    this.count = 0;
  }

  // Keeps { path, fields } and returns whether it outlives a reload.
  add(record) {
    this.count += 1;
    const key = `${this.prefix}${Date.now()}-${String(this.count).padStart(6, "0")}-${randomToken().slice(0, 8)}`;
    try {
      localStorage.setItem(key, JSON.stringify(record));
      return true;
    } catch {
      this.memory.set(key, record);
      return false;
    }
  }

  // All of them, the oldest first.
  all() {
    const found = [...this.memory].map(([key, record]) => ({ key, ...record }));
    try {
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(this.prefix)) found.push({ key, ...JSON.parse(localStorage.getItem(key)) });
      }
    } catch {
      // nothing is stored here
    }
    return found.sort((a, b) => (a.key < b.key ? -1 : 1));
  }

  remove(key) {
    this.memory.delete(key);
    try {
      localStorage.removeItem(key);
    } catch {
      // nothing is stored here
    }
  }
}

// crypto.randomUUID is missing where a page is not encrypted.
function randomToken() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
