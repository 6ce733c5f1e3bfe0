// On the troubleshooting page: shows the messages that have every word of what is typed or pasted.
(() => {
  const lists = document.querySelectorAll("ul.messages");
  const place = document.getElementById("every-message");
  if (!lists.length || !place) return;
  const box = document.createElement("input");
  box.className = "message-filter";
  box.type = "search";
  box.placeholder = "Paste a part of the message";
  box.setAttribute("aria-label", "Filter the messages");
  place.after(box);
  const items = [...document.querySelectorAll("ul.messages li")].map((item) => [item, item.textContent.toLowerCase()]);
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().match(/[\p{L}_=']{3,}/gu) || [];
    // A pasted message has values where ours has names, so most of the words have to fit, not all.
    for (const [item, text] of items) {
      const fitting = words.filter((word) => text.includes(word)).length;
      item.hidden = fitting < 0.7 * words.length;
    }
    for (const list of lists) list.previousElementSibling.hidden = ![...list.children].some((item) => !item.hidden);
  });
})();
