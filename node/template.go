package node

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

const (
	defaultTeam = tenant.DefaultTeam
	// BaseTemplate exists on every node from the first start.
	BaseTemplate = "base"
	// HostImage is the host's own /usr; it needs no download.
	HostImage = "host"
	// defaultTag is what a template's plain name means.
	defaultTag = "default"
	// buildImages begins the names of the images that builds make; the
	// template's ID and, after a colon, the build's follow.
	buildImages = "template/"
	// buildsKept is how many finished builds of a template stay.
	buildsKept = 10
)

// nameOK reports whether s can name a sandbox, snapshot, template or volume.
func nameOK(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i, c := range s {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || !strings.ContainsRune("-_.", c)) {
			return false
		}
	}
	return true
}

// origin is what an image name stands for: a root and the defaults of what runs
// on it.
type origin struct {
	root      sandbox.Root
	env       map[string]string
	user      string
	workdir   string
	command   []string
	resources sandbox.Resources
	template  *Template // nil for a plain image
	build     Build     // of the template; zero for a plain image
}

// resolve finds what an image name stands for: a template, the host, a git
// repository's path, or an OCI image, which is pulled if it is not here.
func (n *Node) resolve(ctx context.Context, name string) (origin, error) {
	const op = "node.resolve"
	switch {
	case name == "":
		return origin{}, sandbox.Errorf(op, sandbox.Invalid, "", "no image was named").WithHint("try `base` or `host`")
	case name == HostImage:
		return origin{root: sandbox.Root{Kind: sandbox.RootHost}}, nil
	case filepath.IsAbs(name):
		if _, err := os.Stat(filepath.Join(name, ".git")); err != nil {
			return origin{}, sandbox.Errorf(op, sandbox.Invalid, name, "there is no git repository at this path")
		}
		return origin{root: sandbox.Root{Kind: sandbox.RootRepository, Path: name}, workdir: sandbox.RepositoryDir}, nil
	}
	t, err := n.GetTemplate(ctx, name)
	if sandbox.Is(err, sandbox.NotFound) && name == BaseTemplate {
		t, err = n.EnsureBase(ctx, nil)
	}
	if err == nil {
		return n.fromTemplate(t, name)
	}
	if !sandbox.Is(err, sandbox.NotFound) {
		return origin{}, err
	}
	img, err := n.pulled(ctx, name, image.RegistryOptions{})
	if err != nil {
		return origin{}, err
	}
	from := fromImage(img)
	if img.Disk > n.cfg.Defaults.Disk {
		from.resources.Disk = img.Disk // unless a larger one is asked for
	}
	return from, nil
}

func fromImage(img image.Image) origin {
	return origin{
		root: img.Root, env: envMap(img.Config.Env), user: img.Config.User, workdir: img.Config.WorkingDir,
		command: slices.Concat(img.Config.Entrypoint, img.Config.Cmd),
	}
}

// envMap turns KEY=value lines into a map; later lines win.
func envMap(lines []string) map[string]string {
	out := make(map[string]string, len(lines))
	for _, line := range lines {
		if k, v, ok := strings.Cut(line, "="); ok {
			out[k] = v
		}
	}
	return out
}

func (n *Node) fromTemplate(t Template, ref string) (origin, error) {
	b, err := t.pick(ref)
	if err != nil {
		return origin{}, err
	}
	img, err := n.cfg.Images.Get(b.Image)
	if err != nil {
		return origin{}, err
	}
	from := fromImage(img)
	from.template, from.build, from.resources = &t, b, b.Resources
	return from, nil
}

// pick returns the finished build that a reference "name" or "name:tag" means.
func (t Template) pick(ref string) (Build, error) {
	_, tag, _ := strings.Cut(ref, ":")
	if b := t.ready(tag); b.ID != "" {
		return b, nil
	}
	return Build{}, sandbox.Errorf("node.resolve", sandbox.Conflict, ref, "the template has no finished build").WithHint("see how its builds went: `atoll template inspect " + t.ID + "`")
}

// ready returns the finished build that a tag means: by tag, by build ID, or
// for an empty tag the default one, else the newest. It is zero when there is none.
func (t Template) ready(tag string) Build {
	id := cmp.Or(t.Tags[cmp.Or(tag, defaultTag)], tag)
	for _, b := range t.Builds {
		if b.State == BuildReady && (b.ID == id || id == "") {
			return b
		}
	}
	return Build{}
}

// fits reports whether the drafted record can start from the build's snapshot,
// which fixes the root, resources and kind of network.
func (n *Node) fits(rec Sandbox, from origin) bool {
	if from.build.Snapshot == "" || len(rec.Spec.Mounts) > 0 {
		return false
	}
	m, err := n.cfg.Snapshots.Get(from.build.Snapshot)
	return err == nil && m.Spec.Root == rec.Spec.Root && m.Spec.Resources == rec.Spec.Resources && m.Spec.Network == rec.Spec.Network
}

// EnsureBase makes the template that exists on every node, from the
// distribution's own packages, and gives it a new build when its recipe has
// changed. progress may be nil.
func (n *Node) EnsureBase(ctx context.Context, progress func(image.Progress)) (Template, error) {
	n.base.Lock() // the image takes a while to make; others wait for it
	defer n.base.Unlock()
	img, err := n.cfg.Images.EnsureBase(ctx, progress)
	if err != nil {
		return Template{}, err
	}
	t, err := n.GetTemplate(ctx, BaseTemplate)
	if err == nil && t.ready("").Root == img.Root.Digest {
		return t, nil
	}
	now := time.Now().UTC()
	b := Build{ID: sandbox.NewID(), State: BuildReady, Created: now, Finished: &now, Image: image.BaseName, Root: img.Root.Digest, Resources: n.cfg.Defaults}
	t = Template{ID: BaseTemplate, Names: []string{BaseTemplate}, Team: defaultTeam, Public: true, Builds: []Build{b},
		Tags: map[string]string{defaultTag: b.ID}, Created: now, Updated: now, Resources: n.cfg.Defaults}
	return t, n.putTemplate(ctx, t)
}

// putTemplate saves a template and makes it visible.
func (n *Node) putTemplate(ctx context.Context, t Template) error {
	if err := n.store.put(ctx, kindTemplate, t.ID, t); err != nil {
		return err
	}
	n.mu.Lock()
	n.templates[t.ID] = &t
	n.mu.Unlock()
	return nil
}

// CreateTemplate makes a template with one waiting build, or adds a build to the
// team's template that has one of the names.
func (n *Node) CreateTemplate(ctx context.Context, want Template) (Template, Build, error) {
	const op = "node.CreateTemplate"
	for _, name := range want.Names {
		if !nameOK(name) {
			return Template{}, Build{}, sandbox.Errorf(op, sandbox.Invalid, name, "not a name for a template")
		}
	}
	now := time.Now().UTC()
	b := Build{ID: sandbox.NewID(), State: BuildWaiting, Created: now, Resources: want.Resources.Or(n.cfg.Defaults)}
	want.Team = cmp.Or(want.Team, defaultTeam)
	for _, name := range want.Names {
		old, err := n.GetTemplate(ctx, name)
		if err != nil {
			continue
		}
		if old.Team != want.Team || old.ID == BaseTemplate {
			return Template{}, Build{}, sandbox.Errorf(op, sandbox.Exists, name, "another template has this name")
		}
		t, err := n.UpdateTemplate(ctx, old.ID, func(t *Template) error {
			t.Builds = append([]Build{b}, t.Builds...)
			t.Resources = b.Resources
			return nil
		})
		return t, b, err
	}
	t := Template{ID: sandbox.NewID(), Names: want.Names, Team: want.Team, Public: want.Public, Builds: []Build{b},
		Created: now, Updated: now, Resources: b.Resources}
	return t, b, n.putTemplate(ctx, t)
}

// GetTemplate returns the template with this ID or name; a tag after a colon is
// ignored.
func (n *Node) GetTemplate(_ context.Context, ref string) (Template, error) {
	name, _, _ := strings.Cut(ref, ":")
	n.mu.RLock()
	defer n.mu.RUnlock()
	if t, ok := n.templates[name]; ok {
		return *t, nil
	}
	for _, t := range n.templates {
		if slices.Contains(t.Names, name) {
			return *t, nil
		}
	}
	return Template{}, sandbox.Errorf("node.GetTemplate", sandbox.NotFound, ref, "no such template").WithHint("see `atoll template ls`")
}

// Templates lists the templates that a team can use (all when team is empty), by age.
func (n *Node) Templates(_ context.Context, team string) []Template {
	n.mu.RLock()
	defer n.mu.RUnlock()
	var out []Template
	for _, t := range n.templates {
		if team == "" || t.Team == team || t.Public {
			out = append(out, *t)
		}
	}
	slices.SortFunc(out, func(a, b Template) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return out
}

// ImageFor is an image as a team sees it that can use these templates: what
// templates' builds made is as private as the template, all else is shared by all
// teams. It is false when the team knows none of the image's names.
func ImageFor(img image.Image, templates []Template) (image.Image, bool) {
	var known []string
	for _, name := range img.Names {
		ref, built := strings.CutPrefix(name, buildImages)
		id, _, _ := strings.Cut(ref, ":")
		if !built || slices.ContainsFunc(templates, func(t Template) bool { return t.ID == id }) {
			known = append(known, name)
		}
	}
	img.Names = known
	return img, len(known) > 0
}

// UpdateTemplate applies fn to a copy of the template and saves it.
func (n *Node) UpdateTemplate(ctx context.Context, ref string, fn func(*Template) error) (Template, error) {
	n.updating.Lock() // updates are rare; one lock for all templates keeps them apart
	defer n.updating.Unlock()
	t, err := n.GetTemplate(ctx, ref)
	if err != nil {
		return Template{}, err
	}
	t.Builds, t.Names = slices.Clone(t.Builds), slices.Clone(t.Names)
	t.Tags = merged(t.Tags, nil)
	if err := fn(&t); err != nil {
		return Template{}, err
	}
	t.Updated = time.Now().UTC()
	return t, n.putTemplate(ctx, t)
}

// RemoveTemplate deletes a template with its builds. Sandboxes made from it go on.
func (n *Node) RemoveTemplate(ctx context.Context, ref string) error {
	const op = "node.RemoveTemplate"
	t, err := n.GetTemplate(ctx, ref)
	if err != nil {
		return err
	}
	if t.ID == BaseTemplate {
		return sandbox.Errorf(op, sandbox.Denied, ref, "every node has this template")
	}
	if err := errors.Join(n.store.delete(ctx, kindPool, t.ID), n.store.delete(ctx, kindTemplate, t.ID)); err != nil {
		return err
	}
	n.mu.Lock()
	delete(n.templates, t.ID)
	delete(n.pools, t.ID)
	maps.DeleteFunc(n.demand, func(k poolKey, _ []time.Time) bool { return k.template == t.ID })
	n.mu.Unlock()
	nudge(n.poolKick)
	var errs []error
	for _, b := range t.Builds {
		errs = append(errs, n.dropBuild(b))
	}
	return errors.Join(append(errs, os.RemoveAll(n.FilesDir(t.ID)))...)
}

// dropBuild removes what a build left: its image's name and its snapshot.
func (n *Node) dropBuild(b Build) error {
	var errs []error
	if b.Snapshot != "" {
		errs = append(errs, n.dropSnapshot(b.Snapshot))
	}
	if b.Image != "" {
		if err := n.cfg.Images.Remove(b.Image); err != nil && !sandbox.Is(err, sandbox.NotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// FilesDir is where the files uploaded for a template's builds lie.
func (n *Node) FilesDir(templateID string) string {
	return filepath.Join(n.cfg.Dir, "contexts", templateID)
}

// used counts a sandbox made from a template. It is only remembered in memory
// until the template is next saved: a count is not worth a disk write per sandbox.
func (n *Node) used(_ context.Context, id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.templates[id]; old != nil {
		t, now := *old, time.Now().UTC()
		t.Spawns++
		t.LastUsed = &now
		n.templates[id] = &t
	}
}

// interrupted marks the builds that were under way when the node stopped as failed.
func interrupted(t Template) *Template {
	for i := range t.Builds {
		if t.Builds[i].State == BuildBuilding {
			t.Builds[i].State, t.Builds[i].Reason = BuildFailed, "the node stopped during the build"
		}
	}
	return &t
}
