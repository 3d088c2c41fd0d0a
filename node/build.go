package node

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
)

const (
	buildTimeout = 30 * time.Minute // for a whole build
	readyTimeout = 5 * time.Minute  // for a template's start command to become ready
	readyEvery   = 500 * time.Millisecond
	linesKept    = 10000 // log lines of one build
)

// BuildRequest says what a template's build does.
type BuildRequest struct {
	Steps        []image.Step `json:"steps"`
	FromImage    string       `json:"fromImage,omitempty"`    // at most one of the two; neither: the base template
	FromTemplate string       `json:"fromTemplate,omitempty"` // by name or ID
	Username     string       `json:"username,omitempty"`     // for FromImage's registry
	Password     string       `json:"password,omitempty"`
	StartCmd     string       `json:"startCmd,omitempty"` // runs in the template's snapshot
	ReadyCmd     string       `json:"readyCmd,omitempty"` // succeeds once StartCmd has come up
	Force        bool         `json:"force,omitempty"`    // without the cache
}

// buildLog is what a build said, for those who ask while it runs and after.
type buildLog struct {
	mu    sync.Mutex
	lines []LogLine
	now   string // the step under way
}

// add notes a line; those beyond linesKept are dropped, but for errors, of which
// there is one at the end.
func (l *buildLog) add(level, step, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) < linesKept || level == "error" {
		l.lines = append(l.lines, LogLine{Time: time.Now().UTC(), Level: level, Step: step, Text: text})
	}
}

// step notes that a step begins or needs no work.
func (l *buildLog) step(r image.StepReport) {
	if r.Done && !r.Cached {
		return
	}
	name, text := strconv.Itoa(r.Index+1), r.Step.String()
	if r.Cached {
		text = "cached: " + text
	}
	l.mu.Lock()
	l.now = name
	l.mu.Unlock()
	l.add("info", name, text)
}

func (l *buildLog) current() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now
}

// StartBuild begins a build that waits. It returns at once; BuildStatus and
// BuildLogs tell how it goes.
func (n *Node) StartBuild(ctx context.Context, templateID, buildID string, req BuildRequest) error {
	const op = "node.StartBuild"
	if req.FromImage != "" && req.FromTemplate != "" {
		return sandbox.Errorf(op, sandbox.Invalid, templateID, "a build starts from an image or from a template, not both")
	}
	log := &buildLog{}
	_, err := n.updateBuild(ctx, templateID, buildID, func(b *Build) error {
		if b.State != BuildWaiting {
			return sandbox.Errorf(op, sandbox.Conflict, buildID, "the build is %s already", b.State)
		}
		b.State, b.StartCmd, b.ReadyCmd = BuildBuilding, req.StartCmd, req.ReadyCmd
		return nil
	})
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.builds[buildID] = log
	n.mu.Unlock()
	n.done.Go(func() { n.runBuild(templateID, buildID, req, log) })
	return nil
}

// runBuild carries a build out and records how it ended.
func (n *Node) runBuild(templateID, buildID string, req BuildRequest, log *buildLog) {
	ctx, stop := context.WithTimeout(n.background, buildTimeout)
	defer stop()
	built, err := n.build(ctx, templateID, buildID, req, log)
	now := time.Now().UTC()
	if err != nil {
		log.add("error", log.current(), err.Error())
	} else {
		log.add("info", "", "the template is ready")
	}
	var old []Build
	_, saveErr := n.UpdateTemplate(context.WithoutCancel(ctx), templateID, func(t *Template) error {
		for i := range t.Builds {
			b := &t.Builds[i]
			if b.ID != buildID {
				continue
			}
			b.Finished = &now
			if err != nil {
				b.State, b.Reason = BuildFailed, err.Error()
				return nil
			}
			b.State, b.Image, b.Root, b.Snapshot = BuildReady, built.Image, built.Root, built.Snapshot
			if t.Tags == nil {
				t.Tags = make(map[string]string)
			}
			if len(b.Tags) == 0 {
				b.Tags = []string{defaultTag}
			}
			for _, tag := range b.Tags {
				t.Tags[tag] = buildID
			}
		}
		t.Builds, old = retire(*t)
		return nil
	})
	if saveErr != nil { // the template was removed meanwhile
		old = append(old, built)
	}
	for _, b := range old {
		if err := n.dropBuild(b); err != nil {
			n.log.Error("removing an old build", "build", b.ID, "error", err)
		}
		n.mu.Lock()
		delete(n.builds, b.ID)
		n.mu.Unlock()
	}
	nudge(n.poolKick)
}

// retire divides a template's builds into those that stay, which are the newest
// and all that have a tag, and those that go.
func retire(t Template) (stay, gone []Build) {
	tagged := make(map[string]bool)
	for _, id := range t.Tags {
		tagged[id] = true
	}
	for i, b := range t.Builds {
		if i < buildsKept || tagged[b.ID] || b.State == BuildBuilding || b.State == BuildWaiting {
			stay = append(stay, b)
		} else {
			gone = append(gone, b)
		}
	}
	return stay, gone
}

// build makes a build's image and, when it has a start command, its snapshot.
func (n *Node) build(ctx context.Context, templateID, buildID string, req BuildRequest, log *buildLog) (Build, error) {
	from := cmp.Or(req.FromImage, req.FromTemplate, BaseTemplate)
	name := buildImages + templateID + ":" + buildID
	img, err := n.BuildImage(ctx, image.BuildRequest{
		Recipe:  image.Recipe{Stages: []image.Stage{{From: from, Steps: req.Steps}}},
		Names:   []string{name},
		NoCache: req.Force,
		Base: func(ctx context.Context, ref string) (image.Image, error) {
			if req.FromImage == "" {
				return n.templateImage(ctx, ref)
			}
			return n.pulled(ctx, ref, image.RegistryOptions{Username: req.Username, Password: req.Password})
		},
		Output: &lineWriter{add: func(line string) { log.add("info", log.current(), line) }},
		Report: func(r image.StepReport) { log.step(r) },
	})
	if err != nil {
		return Build{}, err
	}
	b := Build{ID: buildID, Image: name, Root: img.Root.Digest}
	if req.StartCmd == "" {
		return b, nil
	}
	if b.Snapshot, err = n.bake(ctx, name, templateID, buildID, req, log); err != nil {
		_ = n.dropBuild(b) // swept by the next prune if it fails
	}
	return b, err
}

// bake starts a template's start command in a sandbox, waits until it is ready
// and saves the whole as the state in which the template's sandboxes begin.
func (n *Node) bake(ctx context.Context, imageName, templateID, buildID string, req BuildRequest, log *buildLog) (string, error) {
	const op = "node.bake"
	t, err := n.GetTemplate(ctx, templateID)
	if err != nil {
		return "", err
	}
	var resources sandbox.Resources
	for _, b := range t.Builds {
		if b.ID == buildID {
			resources = b.Resources
		}
	}
	img, err := n.cfg.Images.Get(imageName)
	if err != nil {
		return "", err
	}
	sb, err := n.createInternal(ctx, CreateRequest{Image: imageName, Team: t.Team, Resources: resources}, fromImage(img))
	if err != nil {
		return "", err
	}
	defer func() {
		if err := n.Remove(context.WithoutCancel(ctx), sb.ID); err != nil {
			n.log.Error("removing a build's sandbox", "sandbox", sb.ID, "error", err)
		}
	}()
	g, err := n.Guest(ctx, sb.ID)
	if err != nil {
		return "", err
	}
	log.add("info", "start", "starting: "+req.StartCmd)
	p, err := g.Start(ctx, guest.Command{Args: []string{"/bin/bash", "-l", "-c", req.StartCmd}, Tag: "start"})
	if err != nil {
		return "", err
	}
	p.Close() // ends our view; the process goes on
	if err := waitReady(ctx, g, req.ReadyCmd); err != nil {
		return "", sandbox.E(op, "", req.ReadyCmd, err)
	}
	e, err := n.lock(ctx, op, sb.ID)
	if err != nil {
		return "", err
	}
	defer e.op.unlock()
	s, err := n.takeSnapshot(ctx, n.record(e), Snapshot{Auto: autoTemplate})
	return s.ID, err
}

// waitReady runs the ready command until it succeeds. Without one it gives the
// start command a moment, as E2B does.
func waitReady(ctx context.Context, g *guest.Client, readyCmd string) error {
	ctx, stop := context.WithTimeout(ctx, readyTimeout)
	defer stop()
	if readyCmd == "" {
		readyCmd = "sleep 2"
	}
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		out, err := g.Run(ctx, guest.Command{Args: []string{"/bin/bash", "-l", "-c", readyCmd}})
		if err != nil {
			return err
		}
		if out.ExitCode == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the ready command still fails after %s: %s", readyTimeout, bytes.TrimSpace(out.Stderr))
		case <-tick.C:
		}
	}
}

// BuildStatus tells how far a build has come.
func (n *Node) BuildStatus(ctx context.Context, templateID, buildID string) (Build, error) {
	t, err := n.GetTemplate(ctx, templateID)
	if err != nil {
		return Build{}, err
	}
	for _, b := range t.Builds {
		if b.ID == buildID {
			return b, nil
		}
	}
	return Build{}, sandbox.Errorf("node.BuildStatus", sandbox.NotFound, buildID, "no such build")
}

// BuildLogs returns a build's log from line offset on. Logs live as long as the
// process; those of builds from before it are empty.
func (n *Node) BuildLogs(ctx context.Context, templateID, buildID string, offset int) ([]LogLine, error) {
	if _, err := n.BuildStatus(ctx, templateID, buildID); err != nil {
		return nil, err
	}
	n.mu.RLock()
	log := n.builds[buildID]
	n.mu.RUnlock()
	if log == nil || offset < 0 {
		return nil, nil
	}
	log.mu.Lock()
	defer log.mu.Unlock()
	if offset >= len(log.lines) {
		return nil, nil
	}
	return append([]LogLine(nil), log.lines[offset:]...), nil
}

// updateBuild applies fn to one build of a template and saves it.
func (n *Node) updateBuild(ctx context.Context, templateID, buildID string, fn func(*Build) error) (Template, error) {
	return n.UpdateTemplate(ctx, templateID, func(t *Template) error {
		for i := range t.Builds {
			if t.Builds[i].ID == buildID {
				return fn(&t.Builds[i])
			}
		}
		return sandbox.Errorf("node.updateBuild", sandbox.NotFound, buildID, "no such build")
	})
}
