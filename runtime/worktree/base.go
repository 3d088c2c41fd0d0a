package worktree

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/atoll-run/atoll/sandbox"
)

// A base is the checkout of one commit that all its sandboxes share:
//
//	bases/<repository>-<commit>/tree    the files, with an empty .git to mount over
//	bases/<repository>-<commit>/index   git's index of them

// base returns the directory of a commit's checkout and makes it when it is missing.
func (r *Runtime) base(ctx context.Context, op string, repo *repository, commit string) (string, error) {
	dir := filepath.Join(r.dir, "bases", baseName(repo, commit))
	unlock, err := r.bases.lock(ctx, dir)
	if err != nil {
		return "", sandbox.E(op, "", repo.path, err)
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	temp, err := os.MkdirTemp(filepath.Join(r.dir, "bases"), "new-")
	if err != nil {
		return "", sandbox.E(op, sandbox.Internal, repo.path, err)
	}
	defer os.RemoveAll(temp)
	if err := checkOut(ctx, repo, commit, temp); err != nil {
		return "", sandbox.E(op, "", repo.path, err)
	}
	if err := os.Rename(temp, dir); err != nil {
		return "", sandbox.E(op, sandbox.Internal, repo.path, err)
	}
	return dir, nil
}

// baseName is unique to the repository, its owner and the commit.
func baseName(repo *repository, commit string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d", repo.git, repo.uid, repo.gid))
	return hex.EncodeToString(sum[:8]) + "-" + commit
}

// checkOut writes the files of a commit into dir/tree and their index.
//
// It works from a git directory of its own that only borrows objects: so neither
// the repository's configuration nor its filters have a say.
func checkOut(ctx context.Context, repo *repository, commit, dir string) error {
	git, tree := filepath.Join(dir, "git"), filepath.Join(dir, "tree")
	if err := layGit(git, repo.format, repo.objects, nil); err != nil {
		return err
	}
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	// We write as ourselves and give it all away afterwards: the owner need not
	// be able to enter our directory.
	ours := &repository{path: tree, git: git, uid: os.Geteuid(), gid: os.Getegid()}
	env := []string{
		"GIT_DIR=" + git, "GIT_WORK_TREE=" + tree, "GIT_INDEX_FILE=" + filepath.Join(dir, "index"),
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_ATTR_NOSYSTEM=1",
	}
	for _, args := range [][]string{
		{"read-tree", commit},
		{"-c", "checkout.workers=0", "checkout-index", "--all", "--force", "--index"},
	} {
		if err := ours.stream(ctx, env, nil, nil, args...); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(tree, ".git"), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(git); err != nil {
		return err
	}
	return giveTo(dir, repo.uid, repo.gid)
}

// giveTo makes all below dir, and dir, belong to a user.
func giveTo(dir string, uid, gid int) error {
	if os.Geteuid() == uid && os.Getegid() == gid {
		return nil
	}
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	})
}

// layGit writes a git directory that borrows objects, with extra files given by
// name. It is written by hand: starting git would cost more than all the rest.
func layGit(dir, format string, objects []string, extra map[string]string) error {
	config := "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n" +
		// The index was made on the host, where times of status changes and
		// owners differ from what is seen inside.
		"\tcheckStat = minimal\n\ttrustctime = false\n"
	if format == "sha256" {
		config = strings.Replace(config, "version = 0", "version = 1", 1) + "[extensions]\n\tobjectformat = sha256\n"
	}
	files := map[string]string{
		"HEAD":                    "ref: refs/heads/none\n",
		"config":                  config,
		"objects/info/alternates": strings.Join(objects, "\n") + "\n",
		"refs/heads/.keep":        "",
		"objects/pack/.keep":      "",
	}
	for name, content := range extra {
		if name == "config" {
			content = config + content
		}
		files[name] = content
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if filepath.Base(name) == ".keep" {
			continue
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// pruneBases removes the checkouts that no sandbox stands on, and what a killed
// process left half made.
func (r *Runtime) pruneBases(inUse map[string]bool) error {
	entries, err := os.ReadDir(filepath.Join(r.dir, "bases"))
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !inUse[e.Name()] {
			errs = append(errs, removeAll(filepath.Join(r.dir, "bases", e.Name())))
		}
	}
	return errors.Join(errs...)
}

// removeAll removes a tree in which a sandbox may have left directories that
// even their owner may not enter.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
