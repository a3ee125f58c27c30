/* Tables that can be sorted, and pages that follow what they show. No text of the user's is ever
   used as HTML. */
"use strict";
const live = (() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  function sortable(root) {
    for (const table of $$("table.sortable", root)) {
      $$("thead th", table).forEach((head, column) => {
        const button = element("button", { type: "button" }, ...head.childNodes);
        head.append(button);
        button.addEventListener("click", () => sort(table, head, column));
      });
    }
  }
  function sort(table, head, column) {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of $$("thead th", table)) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const text = new Intl.Collator(undefined, { numeric: true });
    const order = (a, b) => (Number.isFinite(a - b) ? a - b : text.compare(a, b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b)));
    table.tBodies[0].append(...(up ? rows : rows.reverse()));
  }

  // A live page asks for itself again, and replaces the parts that may have changed

  async function follow() {
    const { dataset } = document.body;
    try {
      const answer = await fetch(location.href, { headers: { "X-Live": dataset.version } });
      if (answer.status === 200) {
        replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
      $("#offline").hidden = answer.ok || answer.status === 304;
    } catch {
      $("#offline").hidden = false;
    }
    setTimeout(follow, 1000 * Number(dataset.live));
  }
  function replace(page) {
    Object.assign(document.body.dataset, page.body.dataset);
    document.title = page.title;
    for (const part of $$("[data-part]")) {
      const open = $$("details[open]", part).map((own) => own.id);
      part.replaceChildren(...$(`[data-part="${part.dataset.part}"]`, page).childNodes);
      for (const id of open) $(`#${CSS.escape(id)}`)?.setAttribute("open", "");
      sortable(part);
    }
    exported.refresh(page);
  }

  sortable(document);
  if (document.body.dataset.live) setTimeout(follow, 1000 * Number(document.body.dataset.live));
  const exported = { $, $$, element, refresh: () => {} };  // page.js draws the new curves
  return exported;
})();
