"""Rules of accessibility that a page must keep, checked in the browser: names, landmarks, headings, ids, contrast.

Not a whole audit: those of WCAG's rules that a program can judge and that this console could break.
"""

from __future__ import annotations

from tests.browser.support import Browser

_RULES = r"""
const faults = [];
const visible = (e) => e.checkVisibility({ checkOpacity: false, checkVisibilityCSS: true });
const told = (e) => `${e.tagName.toLowerCase()}${e.id ? '#' + e.id : ''}.${[...e.classList].join('.')}`;
const textOf = (ids) => ids.split(/\s+/).map((id) => document.getElementById(id)?.textContent ?? '').join(' ').trim();
const nameOf = (e) => {
  const by = e.getAttribute('aria-labelledby');
  if (by) return textOf(by);
  if (e.getAttribute('aria-label')) return e.getAttribute('aria-label').trim();
  if (e.labels?.length) return [...e.labels].map((label) => label.textContent).join(' ').trim();
  return (e.textContent || e.title || '').trim();
};

if (!document.documentElement.lang) faults.push('the page names no language');
if (!document.title.trim()) faults.push('the page has no title');
if (document.querySelectorAll('main').length !== 1) faults.push('there is not exactly one main');
if (document.querySelectorAll('h1').length !== 1) faults.push('there is not exactly one h1');

const ids = new Map();
for (const e of document.querySelectorAll('[id]')) ids.set(e.id, (ids.get(e.id) ?? 0) + 1);
for (const [id, times] of ids) if (times > 1) faults.push(`the id ${id} stands ${times} times`);

for (const e of document.querySelectorAll('[aria-labelledby], [aria-describedby]')) {
  for (const attribute of ['aria-labelledby', 'aria-describedby']) {
    for (const id of (e.getAttribute(attribute) ?? '').split(/\s+/).filter(Boolean)) {
      if (!document.getElementById(id)) faults.push(`${told(e)}: ${attribute} names ${id}, which is not there`);
    }
  }
}
for (const e of document.querySelectorAll('a[href], button, input:not([type=hidden]), select, textarea, summary, nav, '
    + 'section, [role=region], [role=log], [tabindex="0"]')) {
  if (visible(e) && !nameOf(e)) faults.push(`${told(e)} has no name`);
}
for (const e of document.querySelectorAll('[tabindex]')) {
  if (e.tabIndex > 0) faults.push(`${told(e)} has a tabindex above 0`);
}
for (const e of document.querySelectorAll('img:not([alt]), svg:not([aria-hidden]):not([role])')) {
  faults.push(`${told(e)} is neither described nor hidden`);
}
for (const table of document.querySelectorAll('table')) {
  if (!table.querySelector('th[scope=col]')) faults.push(`${told(table)} has no column headers`);
}
let level = 0;
for (const e of document.querySelectorAll('h1, h2, h3, h4')) {
  if (!visible(e)) continue;
  const its = Number(e.tagName[1]);
  if (its > level + 1) faults.push(`${told(e)}: a heading of level ${its} follows one of ${level}`);
  level = its;
}
for (const e of document.querySelectorAll('body *')) {
  if (e.scrollHeight > e.clientHeight + 2 && ['auto', 'scroll'].includes(getComputedStyle(e).overflowY)
      && e.tagName !== 'TEXTAREA' && visible(e) && e.tabIndex < 0) faults.push(`${told(e)} scrolls by no key`);
}

const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
canvas.canvas.width = canvas.canvas.height = 1;
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor);
    if (colour[3] > 0.99) return colour;
  }
  return [255, 255, 255, 1];
};
const complained = new Set();
for (const e of document.querySelectorAll('body *')) {
  const isOwnText = [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.nodeValue.trim());
  if (!isOwnText || !visible(e) || e.closest('[disabled], .unseen, option, noscript')) continue;
  const style = getComputedStyle(e);
  const [one, other] = [luminance(rgba(style.color)), luminance(behind(e))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (other + 0.05);
  const isLarge = parseFloat(style.fontSize) >= 24;
  const what = `${told(e)}: contrast ${ratio.toFixed(2)}`;
  if (ratio < (isLarge ? 3 : 4.5) && !complained.has(what)) { complained.add(what); faults.push(what); }
}
return faults;
"""


def faults(page: Browser) -> list[str]:
    """What breaks the rules on the page as it stands."""
    found: list[str] = page.run(_RULES)
    return found
