// Fill the lists of the page. Elements are kept where they are, so that the keyboard's focus stays.

/** Create an element; properties include dataset and the children. */
function create(tag, { children = [], dataset = {}, ...properties } = {}) {
  const created = Object.assign(document.createElement(tag), properties);
  Object.assign(created.dataset, dataset);
  created.append(...children);
  return created;
}

/** Make a parent have one child for each item, found again by its key. */
function sync(parent, items, keyOf, make, change) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    const child = known.get(key) ?? make(item);
    known.delete(key);
    child.dataset.key = key;
    change(child, item);
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  known.forEach((child) => child.remove());
}

const entryKeys = new WeakMap();
let numEntries = 0;

/** Show the opened images as thumbnails, each with its number of objects. */
export function fillStrip(strip, { entries, current }, { select, remove, count }) {
  strip.hidden = !entries.length;
  const keyOf = (entry) => {
    if (!entryKeys.has(entry)) entryKeys.set(entry, numEntries++);
    return entryKeys.get(entry);
  };
  const make = (entry) => create("li", {
    children: [
      create("button", { type: "button", className: "open", onclick: () => select(entry), children: [create("img", { alt: "" })] }),
      create("span", { className: "state", ariaHidden: "true" }),
      create("button", { type: "button", className: "remove", onclick: () => remove(entry), textContent: "×" }),
    ],
  });
  sync(strip, entries, keyOf, make, (item, entry) => {
    const [open, mark, close] = item.children;
    const result = { done: () => count(entry), failed: () => "!" }[entry.state]?.() ?? "…";
    const image = open.firstElementChild;
    if (entry.image && image.src !== entry.url) image.src = entry.url;
    mark.textContent = result;
    open.setAttribute("aria-label", `${entry.name}, ${entry.state === "done" ? `${result} objects` : entry.state}`);
    open.setAttribute("aria-current", entry === current);
    close.setAttribute("aria-label", `Close ${entry.name}`);
  });
}

/** Show a switch for each class of these instances, with the number of those whose score is high enough. */
export function fillClasses(parent, instances, hidden, least, changed) {
  const counts = new Map();
  for (const { category_id: id, category_name: name, score } of instances) {
    counts.set(id, { id, name, count: (counts.get(id)?.count ?? 0) + (score >= least) });
  }
  const make = ({ id, name }) => {
    const box = create("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(id);
      else hidden.add(id);
      changed();
    });
    return create("label", {
      className: "switch",
      children: [box, create("span", { children: [name, create("small")] })],
    });
  };
  const classes = [...counts.values()].sort((a, b) => a.name.localeCompare(b.name));
  sync(parent, classes, ({ id, name }) => `${id} ${name}`, make, (label, { id, count }) => {
    label.firstElementChild.checked = !hidden.has(id);
    label.querySelector("small").textContent = count;
  });
}

/** List instances as buttons. */
export function fillObjects(list, instances, palette, { hover, toggle }) {
  const make = ({ rank }) => {
    const button = create("button", {
      type: "button",
      dataset: { rank },
      onclick: () => toggle(rank),
      onfocus: () => hover(rank),
      onblur: () => hover(undefined),
      onpointerenter: () => hover(rank),
      onpointerleave: () => hover(undefined),
      children: [
        create("span", { className: "dot" }),
        create("span", { className: "name" }),
        create("span", { className: "score" }),
      ],
    });
    return create("li", { children: [button] });
  };
  sync(list, instances, ({ rank }) => rank, make, (item, { rank, category_name: name, score }) => {
    const [dot, label, percent] = item.firstElementChild.children;
    dot.style.background = palette[rank % palette.length];
    label.textContent = name;
    percent.textContent = `${Math.round(100 * score)}%`;
  });
}

/** Show a choice of the activation map of each group; none where there is a single one. */
export function fillMapNumbers(parent, numMaps, chosen, choose) {
  parent.hidden = numMaps < 2;
  const numbers = numMaps < 2 ? [] : [...Array(numMaps).keys()];
  const make = (number) => create("label", {
    className: "switch",
    children: [
      create("input", {
        type: "radio", name: "map-number", ariaLabel: `Map ${number + 1}`, onchange: () => choose(number),
      }),
      create("span", { textContent: number + 1 }),
    ],
  });
  sync(parent, numbers, (number) => number, make, (label, number) => {
    label.firstElementChild.checked = number === chosen;
  });
}

/** Mark the instance that stands out, and the selected one. */
export function markActive(active, selected) {
  for (const button of document.querySelectorAll("#objects button")) {
    const rank = Number(button.dataset.rank);
    button.classList.toggle("active", rank === active);
    button.setAttribute("aria-pressed", rank === selected);
  }
}
