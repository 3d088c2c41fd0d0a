package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/atoll-run/atoll/internal/machine"
)

// report is what was measured, in Markdown.
func (b *bench) report(took time.Duration) string {
	var w strings.Builder
	fmt.Fprintf(&w, "# Language models on the CPU, beside llama.cpp\n\n%s, %s. Written by `make bench-llm` in %.0f minutes.\n\n",
		time.Now().UTC().Format(time.DateOnly), machine.Describe(), took.Minutes())
	fmt.Fprintf(&w, "TinyLlama-1.1B is random weights in that shape (%d layers of %d, %d heads on %d, FFN %d, vocabulary 49152), since speed does not depend "+
		"on what weights say; SmolLM2 is the real one. All engines have the same file and threads and take turns; figures are medians of the turns, in tokens a "+
		"second. Reading: a prompt of %d tokens; writing: %d more, one by one; %d texts: tokens of so many texts together that are written at once (by llama.cpp "+
		"with huge pages). The limit is how fast memory on huge pages can be read by as many threads, measured in the same turns; of the limit: the weights of "+
		"a token, times tokens a second, over that.\n\n", b.layers, dim, heads, kvHeads, ffn, b.prompt, b.answer, batch)
	switch {
	case b.llama != nil:
		fmt.Fprintf(&w, "llama.cpp is the prebuilt one of %s, driven by its bindings for Node.js (%s). Its default maps the file; with huge pages means "+
			"without mmap and with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.\n\n", b.llama.name(), b.llama.release)
	default:
		fmt.Fprintf(&w, "llama.cpp was not measured: %v.\n\n", b.absent)
	}
	w.WriteString("| weights | threads | engine | reading | writing | of the limit | " + fmt.Sprint(batch) + " texts | ours / it: reading | writing | " + fmt.Sprint(batch) + " texts | turns |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
	for i := range b.cells {
		for e, name := range engineNames {
			w.WriteString(b.cells[i].line(name, e))
		}
	}
	b.besides(&w)
	b.sizes(&w)
	if len(b.firsts) > 0 {
		fmt.Fprintf(&w, "\n## The first token before the whole model has arrived\n\nSeconds until the first token of an answer to a prompt of %d tokens, %s, %d threads, median of 3: from a "+
			"link of %d MB/s by HTTP ranges, and from a disk whose file is not in the page cache.\n\n| source | way | seconds |\n|---|---|---|\n", b.prompt, b.startsOn, b.allThreads(), linkRate>>20)
		for _, s := range b.firsts {
			fmt.Fprintf(&w, "| %s | %s | %.2f |\n", s.source, s.way, s.seconds)
		}
	}
	return w.String()
}

// line is an engine's row of a cell; empty if it was not measured.
func (c *cell) line(name string, e int) string {
	if c.decode[e] == 0 {
		return ""
	}
	many, reading, ratio, manyRatio := "", "", "", ""
	if c.many[e] > 0 {
		many, manyRatio = fmt.Sprintf("%.0f (%.1fx)", c.many[e], c.many[e]/c.decode[e]), fmt.Sprintf("%.2f", c.many[atoll]/c.many[e])
	}
	if c.prefill[e] > 0 {
		reading, ratio = fmt.Sprintf("%.1f", c.prefill[e]), fmt.Sprintf("%.2f", c.prefill[atoll]/c.prefill[e])
	}
	return fmt.Sprintf("| %s | %d | %s | %s | %.1f | %.0f %% of %.1f GB/s | %s | %s | %.2f | %s | %d |\n", c.model, c.threads, name, reading, c.decode[e],
		100*c.decode[e]*float64(c.bytes)/c.limit, c.limit/1e9, many, ratio, c.decode[atoll]/c.decode[e], manyRatio, c.rounds)
}

// besides is what a load on all CPUs does.
func (b *bench) besides(w *strings.Builder) {
	w.WriteString("\n## Beside other work\n\nWriting while another process computes on every CPU; the part of the speed without it that is left. Half would be " +
		"each one's fair share.\n\n| weights | threads | engine | tokens a second | left |\n|---|---|---|---|---|\n")
	for _, c := range b.cells {
		for e, name := range engineNames {
			if c.loaded[e] > 0 {
				fmt.Fprintf(w, "| %s | %d | %s | %.1f | %.0f %% |\n", c.model, c.threads, name, c.loaded[e], 100*c.loaded[e]/c.decode[e])
			}
		}
	}
}

// sizes is what disk, memory and time an engine takes.
func (b *bench) sizes(w *strings.Builder) {
	w.WriteString("\n## Loading and memory\n\nLoading is from the page cache. Memory is what the process has resident after loading beyond what it had before (Atoll), or all of it " +
		"(llama.cpp with its bindings; of a mapped file what it has touched).")
	if info, err := os.Stat("bin/atoll"); err == nil {
		fmt.Fprintf(w, " The binary, with everything else that it does, has %.0f MB.", float64(info.Size())/1e6)
	}
	w.WriteString("\n\n| weights | engine | load | memory | weights |\n|---|---|---|---|---|\n")
	for _, c := range b.cells {
		if c.threads != b.allThreads() {
			continue
		}
		for e, name := range engineNames {
			if c.memory[e] > 0 {
				fmt.Fprintf(w, "| %s | %s | %.2f s | %.0f MB | %.0f MB |\n", c.model, name, c.took[e], float64(c.memory[e])/1e6, float64(c.bytes)/1e6)
			}
		}
	}
}
