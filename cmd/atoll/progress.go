package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

// redrawEvery bounds how often a bar is drawn: often enough to move, seldom
// enough to cost nothing.
const redrawEvery = 80 * time.Millisecond

// bar shows on one line of a terminal how far something is, and removes the
// line when it is done. Without a terminal it shows nothing.
type bar struct {
	w     io.Writer // nil: show nothing
	width int       // of the terminal, in characters
	label string

	mu     sync.Mutex
	stages []stage // in the order in which they appeared, at most maxStages
	drawn  time.Time
	begun  time.Time
}

type stage struct {
	name        string
	done, total int64
}

// maxStages bounds how many layers a bar adds up.
const maxStages = 1024

func (a *app) bar(label string) *bar {
	b := &bar{label: label, width: 80, begun: time.Now()}
	if f, ok := isTerminal(a.stderr); ok {
		b.w = f
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			b.width = width
		}
	}
	return b
}

// report takes what an operation says of its progress.
func (b *bar) report(p image.Progress) {
	if b.w == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	at := -1
	for i := range b.stages {
		if b.stages[i].name == p.Stage {
			at = i
		}
	}
	if at < 0 && len(b.stages) < maxStages {
		b.stages = append(b.stages, stage{name: p.Stage})
		at = len(b.stages) - 1
	}
	if at >= 0 {
		b.stages[at].done, b.stages[at].total = p.Done, p.Total
	}
	if now := time.Now(); now.Sub(b.drawn) >= redrawEvery {
		b.drawn = now
		fmt.Fprint(b.w, "\r"+barLine(b.label, b.stages, p.Stage, now.Sub(b.begun), b.width)+"\x1b[K")
	}
}

// done removes the line.
func (b *bar) done() {
	if b.w != nil {
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// barLine draws a bar for the bytes of all stages together, or names the stage
// at work when none of them has bytes. It is narrower than width characters.
func barLine(label string, stages []stage, now string, elapsed time.Duration, width int) string {
	var done, total int64
	for _, s := range stages {
		if s.total > 0 {
			done, total = done+s.done, total+s.total
		}
	}
	line := label + "  " + now
	if total > 0 {
		rate := ""
		if s := elapsed.Seconds(); s >= 1 {
			rate = "  " + formatBytes(int64(float64(done)/s)) + "/s"
		}
		numbers := fmt.Sprintf("  %s / %s%s", formatBytes(done), formatBytes(total), rate)
		room := min(40, width-len([]rune(label))-len(numbers)-5)
		line = label + numbers
		if room >= 10 {
			full := int(min(done, total) * int64(room) / total)
			line = label + "  [" + strings.Repeat("=", full) + strings.Repeat(" ", room-full) + "]" + numbers
		}
	} else if s := elapsed.Truncate(time.Second); s > 0 {
		line += "  " + s.String()
	}
	if r := []rune(printable(line)); len(r) >= width && width > 1 {
		line = string(r[:width-1])
	}
	return line
}

func pullFlag(cmd *cobra.Command, pull *string) {
	cmd.Flags().StringVar(pull, "pull", "missing", "fetch the image `when`: missing, always or never")
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions([]string{"missing", "always", "never"}, cobra.ShellCompDirectiveNoFileComp))
}

// fetch sees to it that the image is there, by the policy of --pull. The node
// would do so by itself, but could not show how far it is.
func (a *app) fetch(ctx context.Context, b native.Backend, ref, pull string) error {
	switch pull {
	case "missing", "always", "never":
	default:
		return usageError(pull, "use --pull missing, always or never", "there is no such policy")
	}
	if ref == image.HostName || strings.HasPrefix(ref, "/") || pull == "missing" && !a.interactive {
		return nil
	}
	_, err := b.GetTemplate(ctx, ref)
	if sandbox.Is(err, sandbox.NotFound) {
		_, err = b.GetImage(ctx, ref)
		if err == nil && pull == "always" {
			err = sandbox.E("atoll", sandbox.NotFound, ref, nil) // as if it were not there
		}
	}
	switch {
	case !sandbox.Is(err, sandbox.NotFound):
		return err
	case pull == "never":
		return sandbox.Errorf("atoll", sandbox.NotFound, ref, "the image is not on this node").WithHint("leave out --pull never")
	}
	_, err = a.pull(ctx, b, native.PullRequest{Ref: ref})
	return err
}

// pull fetches an image and shows how far it is.
func (a *app) pull(ctx context.Context, b native.Backend, req native.PullRequest) (image.Image, error) {
	label := "pulling " + req.Ref
	if req.Ref == image.BaseName {
		label = "making base"
	}
	shown := a.bar(label)
	defer shown.done()
	return b.PullImage(ctx, req, shown.report)
}
