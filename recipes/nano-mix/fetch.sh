#!/usr/bin/env bash
# fetch.sh FOLDER: the text of nano-mix that no Python environment holds, from Debian's packages and the npm registry. About 1 GB.
set -euo pipefail
mkdir -p "$1/apt/root" "$1/npm"
cd "$1/apt"
apt-get download python3.11-doc git-doc debian-policy developers-reference debian-reference-en postgresql-doc-15 sqlite3-doc \
    python-django-doc python-sqlalchemy-doc nodejs-doc bash-doc llvm-14-doc linux-doc-6.1 apache2-doc \
    libboost1.74-dev libeigen3-dev nlohmann-json3-dev libabsl-dev libfmt-dev librange-v3-dev
for package in *.deb; do
    mkdir -p "root/${package%%_*}" && dpkg-deb -x "$package" "root/${package%%_*}"
done
cd ../npm
echo '{"name":"nano-mix-text","version":"1.0.0"}' >package.json
npm install --ignore-scripts --no-audit --no-fund \
    eslint webpack express lodash mocha jest jquery underscore backbone d3 three vue@2 handlebars rollup react-dom gulp grunt bower \
    async bluebird request commander yargs sinon chai qunit karma bootstrap socket.io mongoose sequelize knex pug ejs marked \
    highlight.js codemirror@5 jsdom cheerio babel-core mdn-data ajv json-schema-test-suite ramda moment passport hexo leaflet \
    openlayers fabric konva pixi.js@5 matter-js p5 jasmine-core requirejs html5-boilerplate h5bp normalize.css jquery-ui \
    swagger-ui-dist @hyperjump/json-schema
