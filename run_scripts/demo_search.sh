#!/usr/bin/env bash
# Index the demo's clips with the adapter that the demo trained, and open the page to search them.
# The demo runs first where it has not run yet.
#
#     bash run_scripts/demo_search.sh            the page, at http://127.0.0.1:8642
#     bash run_scripts/demo_search.sh --check    search in a headless Chromium, take a screenshot, end
case "${1:-}" in
    "" | --check) ;;
    *) echo "error: unknown argument '$1'; --check is the only one" >&2 && exit 1 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

demo=output/demo
adapter=$demo/retrieval-clips-seed42/adapter_best
base=$demo/retrieval-stills-seed42/checkpoint_best.pth
index=$demo/search

[ -d "$adapter" ] && [ -f "$base" ] || uniadapter demo
rm -rf "$index" # of another adapter, perhaps
uniadapter search index "${LAVIS_CACHE_ROOT:-cache}/shapes/clips/videos" --index "$index" \
    --cfg shapes_retrieval --adapter "$adapter" --options model.pretrained="$base"

[ "${1:-}" = --check ] && exec python run_scripts/check_search_page.py "$index"
exec uniadapter search serve --index "$index"
