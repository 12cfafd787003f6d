"use strict";
(() => {
  const properties = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font", "text-anchor"];
  const scale = 2;

  // A copy of a drawing that needs nothing beside it: every element carries the colours that it is shown in.
  function standalone(drawing) {
    const copy = drawing.cloneNode(true);
    const shown = [drawing, ...drawing.querySelectorAll("*")], copied = [copy, ...copy.querySelectorAll("*")];
    shown.forEach((element, number) => {
      const style = getComputedStyle(element);
      for (const name of properties) copied[number].style.setProperty(name, style.getPropertyValue(name));
    });
    const ground = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    ground.setAttribute("width", "100%");
    ground.setAttribute("height", "100%");
    ground.style.setProperty("fill", getComputedStyle(drawing.closest("section") || document.body).backgroundColor);
    copy.prepend(ground);
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    return new XMLSerializer().serializeToString(copy);
  }

  function save(content, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  async function saveAs(kind, bar) {
    const drawing = [...bar.closest("figure").querySelectorAll("svg")].find(one => one.getClientRects().length);
    const text = standalone(drawing), name = `${bar.dataset.name}.${kind.toLowerCase()}`;
    if (kind === "SVG") return save(new Blob([text], {type: "image/svg+xml"}), name);
    const picture = new Image(), canvas = document.createElement("canvas");
    picture.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
    await picture.decode();
    canvas.width = scale * drawing.viewBox.baseVal.width;
    canvas.height = scale * drawing.viewBox.baseVal.height;
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(content => save(content, name), "image/png");
  }

  for (const bar of document.querySelectorAll(".save")) {
    for (const kind of ["SVG", "PNG"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = kind;
      button.setAttribute("aria-label", `${bar.dataset.name} as ${kind}`);
      button.addEventListener("click", () => saveAs(kind, bar));
      bar.append(button);
    }
  }
})();
