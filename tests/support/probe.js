// What a reader could stumble over on the page, as it stands: an object of lists, all empty on a good page.
(() => {
  const shown = (each) => each.checkVisibility({ visibilityProperty: true });
  const box = (each) => each.getBoundingClientRect();
  const name = (each) => `${each.localName}.${each.getAttribute("class") ?? ""}: ${each.textContent.trim().slice(0, 60)}`;

  // A colour is seen on the nearest ground behind it.
  const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
  const ground = (each) => {
    for (let one = each; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return channels(getComputedStyle(document.body).backgroundColor);
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const contrast = (one, other) => {
    const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const own = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || ["script", "style", "noscript", "option"].includes(own.localName) || !shown(own)) continue;
    const inSvg = own.ownerSVGElement;
    if (inSvg && own.closest(".mark-text") && own.closest("[data-plot=memory]")) continue; // on a bar, not on the ground
    const style = getComputedStyle(own);
    const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    if (contrast(channels(inSvg ? style.fill : style.color), ground(own)) < least) faint.push(name(own));
  }

  const overlapping = [];
  const outside = [];
  for (const svg of document.querySelectorAll(".canvas svg")) {
    if (!shown(svg)) continue;
    const frame = box(svg);
    const labels = [...svg.querySelectorAll("text")].filter((each) => each.textContent && shown(each) && getComputedStyle(each).opacity !== "0");
    labels.forEach((one, i) => {
      const a = box(one);
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1) outside.push(name(one));
      for (const other of labels.slice(i + 1)) {
        const b = box(other);
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1) overlapping.push(`${name(one)} | ${name(other)}`);
      }
    });
  }
  for (const each of document.querySelectorAll(".card, .recommendation, .card *, figcaption, h1, h2, summary, .changes li, button, nav")) {
    if (each.closest(".scroll")) continue; // a table scrolls in its own frame
    if (shown(each) && each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== "inline") outside.push(name(each));
    if (shown(each) && box(each).right > innerWidth + 1) outside.push(name(each));
  }

  const empty = [];
  for (const section of document.querySelectorAll("main > section")) {
    const rest = section.innerText.replace(section.querySelector("h2").innerText, "").trim();
    if (rest.length < 20) empty.push(section.id);
    if (!section.querySelector("h2").innerText.endsWith("?")) empty.push(`${section.id}: no question`);
  }
  for (const plot of document.querySelectorAll(".plot")) {
    if (shown(plot) && !plot.querySelector("svg .role-mark :is(path, line, rect)")) empty.push(`plot ${plot.dataset.plot}`);
  }
  for (const table of document.querySelectorAll("table")) if (!table.tBodies[0]?.rows.length) empty.push(table.id);

  const regions = {};
  const wanted = {
    recommendation: "article:not([hidden]) .recommendation", cards: "article:not([hidden]) .cards", grid: "article:not([hidden]) .scroll",
    changes: "ul.changes", times: "[data-plot=times]", memory: "[data-plot=memory]", quality: "[data-plot=quality]", claims: "#claims", history: "[data-plot=history]",
  };
  for (const [key, where] of Object.entries(wanted)) {
    const found = document.querySelector(where);
    if (found && shown(found)) regions[key] = [box(found).left + scrollX, box(found).top + scrollY, box(found).right + scrollX, box(found).bottom + scrollY];
  }
  const pen = document.createElement("canvas").getContext("2d");
  const fonts = [getComputedStyle(document.body).fontFamily, "sans-serif"].map((family) => {
    pen.font = `100px ${family}`;
    return Math.round(pen.measureText("Which method should I use? 0123456789").width);
  });
  const { scrollWidth, scrollHeight } = document.documentElement;
  return { faint, overlapping, outside, empty, regions, fonts, wide: scrollWidth > innerWidth ? [scrollWidth] : [], height: scrollHeight };
})()
